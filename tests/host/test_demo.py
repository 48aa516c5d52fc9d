"""The demo: its models give the same numbers in the host as in diffusers, and its node feeds the other nodes.

The models are compared at the shipped sizes and at those of a stand-in (tiny_weights.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import comfy.memory_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import numpy as np
import pytest
import torch

from devkit.host import golden
from devkit.hosts import ROOT
from easyref_core.tiny import demo_group as shapes
from easyref_core.tiny.creatures import demo_group as creatures
from easyref_core.tiny.demo_group import demo_plan
from easyref_core.tiny.images import NAMES, held_out
from easyref_core.tiny.worlds import WORLDS
from easyref_core.training.base_model import BaseModel

from . import tiny_weights

pytestmark = pytest.mark.one_host


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_weights.write(folder)
    return folder


@pytest.fixture(scope="module", params=["stand-in", *WORLDS])
def base(request: pytest.FixtureRequest, stand_in: Path) -> Path:
    """The diffusers folder of a tiny SDXL."""
    return (stand_in if request.param == "stand-in" else WORLDS[request.param].weights) / "base"


@pytest.fixture(scope="module")
def diffusers(base: Path) -> BaseModel:
    return BaseModel.load(base)


@pytest.fixture(scope="module")
def tiny_sdxl(pack):
    return golden.part(pack, "nodes.demo.tiny_sdxl")


@pytest.fixture(scope="module")
def vae(pack, base: Path) -> comfy.sd.VAE:
    return golden.part(pack, "nodes.demo.tiny_vae").load_vae(base)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The same numbers as diffusers'

TOO_LONG = "a blue striped circle on the grass at the left, and far more than has room"
PROMPTS = ["a red thing on sand", "", TOO_LONG]


def predictions(patcher: comfy.model_patcher.ModelPatcher, diffusers: BaseModel) -> tuple[torch.Tensor, ...]:
    """Noise predicted for random latents by the host's and by diffusers' UNet."""
    text = diffusers.encode_text(PROMPTS)
    side = diffusers.unet.config.sample_size
    channels = diffusers.unet.config.in_channels
    latents, steps = random(0, 3, channels, side, side), torch.tensor([1.0, 400.0, 999.0])
    model = patcher.model
    sizes = model.encode_adm(pooled_output=text.pooled, width=64, height=56)
    with torch.inference_mode():
        in_host = model.diffusion_model(latents, steps, context=text.states, y=sizes)
        time_ids = diffusers.time_ids((56, 64), (0, 0), (56, 64), batch=3)
        added = {"text_embeds": text.pooled, "time_ids": time_ids}
        in_diffusers = diffusers.unet(latents, steps, text.states, added_cond_kwargs=added).sample
    return in_host, in_diffusers


def test_unet_is_diffusers(tiny_sdxl, base, diffusers) -> None:
    assert golden.error(*predictions(tiny_sdxl.load_model(base), diffusers)) <= 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_shipped_checkpoint_fits_the_shipped_unet(pack, tiny_sdxl, world: str) -> None:
    files = WORLDS[world]
    checkpoint, mllm = files.weights / files.easyref, files.weights / files.mllm
    easyref = golden.part(pack, "nodes.host.hosted_model").load_hosted(checkpoint, mllm, "auto", None)
    condition = golden.part(pack, "nodes.unet_patch.condition")
    widths = condition.cross_attention_widths(tiny_sdxl.load_model(files.weights / "base"))
    assert widths == easyref.model.checkpoint.widths


def test_unet_is_the_same_under_dynamic_vram(tiny_sdxl, base, diffusers, monkeypatch) -> None:
    """With its switch simulated: its layers do not have weights until they are loaded."""
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
    patcher = tiny_sdxl.load_model(base)
    monkeypatch.undo()
    assert golden.error(*predictions(patcher, diffusers)) <= 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoised_latents_are_those_of_the_folders_prediction_type(
    tiny_sdxl, stand_in, tmp_path, kind: str
) -> None:
    folder = shutil.copytree(stand_in / "base", tmp_path / "base")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": kind}))
    diffusers, model = BaseModel.load(folder), tiny_sdxl.load_model(folder).model
    text, step = diffusers.encode_text(PROMPTS), torch.tensor([400.0] * len(PROMPTS))
    noisy = random(5, len(PROMPTS), diffusers.unet.config.in_channels, 8, 8)
    signal = diffusers.schedule.alphas_cumprod[400]
    added = {"text_embeds": text.pooled, "time_ids": diffusers.time_ids((64, 64), (0, 0), (64, 64), batch=3)}
    y = model.encode_adm(pooled_output=text.pooled, width=64, height=64)
    with torch.inference_mode():
        predicted = diffusers.unet(noisy, step, text.states, added_cond_kwargs=added).sample
        denoised = model.apply_model(
            noisy / signal.sqrt(), ((1 - signal) / signal).sqrt().expand(3), c_crossattn=text.states, y=y
        )
    if kind == "epsilon":
        expected = (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()
    else:
        expected = signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
    assert golden.error(denoised, expected) <= 1e-4


def test_latents_are_scaled_by_the_folders_factor(tiny_sdxl, base, diffusers) -> None:
    model = tiny_sdxl.load_model(base).model
    latents = random(1, 1, diffusers.unet.config.in_channels, 2, 2)
    assert torch.equal(model.process_latent_in(latents), latents * diffusers.vae.config.scaling_factor)
    torch.testing.assert_close(model.process_latent_out(model.process_latent_in(latents)), latents)


def test_an_empty_latent_gets_the_channels_of_the_unet(tiny_sdxl, base, diffusers) -> None:
    """EmptyLatentImage always makes 4."""
    latents = comfy.sample.fix_empty_latent_channels(tiny_sdxl.load_model(base), torch.zeros(2, 4, 8, 8))
    assert latents.shape == (2, diffusers.unet.config.in_channels, 8, 8)


def test_noise_schedule_is_the_folders(tiny_sdxl, base, diffusers) -> None:
    sampling = tiny_sdxl.load_model(base).get_model_object("model_sampling")
    alphas = diffusers.schedule.alphas_cumprod
    torch.testing.assert_close(sampling.sigmas, ((1 - alphas) / alphas).sqrt(), rtol=1e-4, atol=1e-6)


def test_conditioning_is_that_of_training(pack, base, diffusers) -> None:
    conditionings = golden.part(pack, "nodes.demo.demo").conditionings(base, tuple(PROMPTS))
    text = diffusers.encode_text(PROMPTS)
    for i, ((states, extra),) in enumerate(conditionings):
        torch.testing.assert_close(states, text.states[i : i + 1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(extra["pooled_output"], text.pooled[i : i + 1], atol=1e-6, rtol=1e-5)


def test_vae_decodes_as_diffusers(vae, diffusers) -> None:
    latents = random(2, 2, diffusers.vae.config.latent_channels, 8, 8)
    with torch.inference_mode():
        expected = diffusers.decode(latents * diffusers.vae.config.scaling_factor).movedim(1, -1)
        torch.testing.assert_close(vae.decode(latents), expected, atol=1e-4, rtol=0)


def test_vae_encodes_as_diffusers(vae, diffusers) -> None:
    images = random(3, 2, 64, 64, 3).sigmoid()
    with torch.inference_mode():
        latents = vae.encode(images) * diffusers.vae.config.scaling_factor
        expected = diffusers.encode_images(images.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_vae_has_the_interface_of_the_hosts_vae_nodes(vae, diffusers) -> None:
    """Images and tiles of 64 x 64, for VAEDecode, VAEEncode, their tiled forms and VAEEncodeForInpaint."""
    images = random(4, 1, 128, 128, 3).sigmoid()
    assert vae.spacial_compression_encode() == vae.spacial_compression_decode() == 8
    with torch.inference_mode():
        latents = vae.encode(images)
        tiled = vae.encode_tiled(images, tile_x=64, tile_y=64, overlap=0)
        assert latents.shape == tiled.shape == (1, diffusers.vae.config.latent_channels, 16, 16)
        assert vae.decode(latents).shape == images.shape
        assert vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=0).shape == images.shape


def test_host_can_load_the_model_again(tiny_sdxl, base) -> None:
    """The host does so for hooks and for several GPUs."""
    patcher = tiny_sdxl.load_model(base)
    load, arguments = patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert type(again) is comfy.model_patcher.ModelPatcher
    assert type(patcher) is comfy.model_patcher.CoreModelPatcher
    for name, weight in patcher.model.diffusion_model.state_dict().items():
        assert torch.equal(weight, again.model.diffusion_model.state_dict()[name]), name


# The node


@pytest.fixture
def demo(pack, stand_in: Path, monkeypatch):
    """nodes.demo.demo with the stand-in as its models."""
    monkeypatch.setattr(golden.part(pack, "nodes.host.folders"), "SHIPPED", dict.fromkeys(WORLDS, stand_in))
    return golden.part(pack, "nodes.demo.demo")


def outputs(demo, **changes) -> dict:
    inputs = {"prompt": "", "negative_prompt": "", "example": 3, "references": 4, "with_outsider": False}
    with torch.inference_mode():
        result = demo.EasyRefDemo.execute(**inputs | changes).result
    names = ("model", "positive", "negative", "vae", "references", "prompt", "shared")
    return dict(zip(names, result, strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [2, 6])
def test_references_are_a_batch_of_images(demo, world: str, count: int) -> None:
    images = outputs(demo, world=world, references=count)["references"]
    assert images.shape == (count, 64, 64, 3)
    assert 0 <= images.min() < images.max() <= 1


def test_example_is_reproducible(demo) -> None:
    first, again = outputs(demo), outputs(demo)
    assert torch.equal(first["references"], again["references"])
    assert (first["prompt"], first["shared"]) == (again["prompt"], again["shared"])
    assert not torch.equal(first["references"], outputs(demo, example=4)["references"])


def test_empty_prompt_is_the_examples(demo) -> None:
    prompt = shapes.demo_group(3, 4, False).prompt
    empty = outputs(demo, prompt=" ")
    assert empty["prompt"] == prompt != ""
    assert torch.equal(empty["positive"][0][0], outputs(demo, prompt=prompt)["positive"][0][0])


def test_world_is_that_of_earlier_workflows_unless_chosen(demo) -> None:
    """Workflows saved before there were two have no value for it."""
    saved, chosen = outputs(demo), outputs(demo, world="shapes")
    assert torch.equal(saved["references"], chosen["references"])
    of_creatures = outputs(demo, world="creatures")
    assert of_creatures["shared"] == creatures.demo_group(3, 4, False).shared != saved["shared"]
    assert not torch.equal(of_creatures["references"], saved["references"])


@pytest.mark.parametrize(
    ("world", "prompt", "unknown"),
    [
        ("shapes", "a blue thing on sand, (striped:1.2)", None),
        ("shapes", "a dog on grass, two moons", "'dog', 'two', 'moons'"),
        ("creatures", "two creatures on sand", None),
        ("creatures", "a tall red creature with fine teal stripes", None),
        ("creatures", "A furry creature", "'A', 'furry'"),
    ],
)
def test_words_that_the_model_does_not_know_are_named(demo, world, prompt, unknown) -> None:
    inputs = {"negative_prompt": "", "example": 3, "references": 2, "with_outsider": False}
    with torch.inference_mode():
        shown = demo.EasyRefDemo.execute(prompt=prompt, world=world, **inputs).ui
    about, shared, *warnings = shown["text"][0].splitlines()
    assert about.startswith("Prompt: ")
    assert shared == f"Shared: {demo.DEMO_GROUPS[world].demo_group(3, 2, False).shared}"
    if unknown is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(f"Warning: the tiny model was not trained on {unknown}. Its words are: ")


def test_prompt_of_the_user_is_used_and_returned(demo) -> None:
    result = outputs(demo, prompt="a blue thing", negative_prompt="a red thing")
    assert result["prompt"] == "a blue thing"
    swapped = outputs(demo, prompt="a red thing", negative_prompt="a blue thing")
    assert torch.equal(result["positive"][0][0], swapped["negative"][0][0])
    assert not torch.equal(result["positive"][0][0], result["negative"][0][0])


def test_outsider_shares_nothing_and_is_named(demo) -> None:
    plan = demo_plan(3, 5, True)
    columns = [NAMES.index(name) for name in plan.shared]
    *others, outsider = plan.references[:, columns]
    assert (np.array(others) == plan.target[columns]).all()
    assert (outsider != plan.target[columns]).all()
    assert "reference 6," in outputs(demo, references=5, with_outsider=True)["shared"]


def test_target_of_an_example_is_held_out_from_training() -> None:
    assert all(held_out(demo_plan(example, 4, False).target) for example in range(50))


def test_missing_model_is_an_error_with_a_remedy(demo, tmp_path, monkeypatch, pack) -> None:
    monkeypatch.setattr(golden.part(pack, "nodes.host.folders"), "SHIPPED", {"shapes": tmp_path})
    with pytest.raises(FileNotFoundError, match="Install the complete pack again") as missing:
        outputs(demo)
    assert str(tmp_path) in str(missing.value)


def test_workflow_needs_neither_files_nor_other_packs() -> None:
    workflow = json.loads((ROOT / "workflows" / "try_it_now.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        assert "models" not in node["properties"], node["type"]
        assert node["type"] == "MarkdownNote" or node["properties"]["cnr_id"] in ("comfy-core", "easyref")
