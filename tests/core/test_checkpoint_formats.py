"""Each format a checkpoint comes in, read by its keys: what is used, what is ignored, and the sizes found."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, Tensors, checkpoint_tensors, error, write, write_deepspeed
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.checkpoint.formats import METADATA_KEY
from easyref_core.unet.layout import sdxl_sites

BODY = "multimodal_llm."


def without(tensors: Tensors, pattern: str) -> Tensors:
    """The tensors whose names do not match."""
    return {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    """The tensors under other names: (pattern, replacement) each."""
    for pattern, new in rules:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def load(path: Path, mllm: Path = golden.MLLM) -> er.EasyRef:
    return er.load(path, mllm)


def tokens_of(model: er.EasyRef) -> torch.Tensor:
    """Tokens of the golden group."""
    return model.aggregate(model.encode(golden.references(), golden.PROMPT, size=golden.SIZE))


def is_golden(model: er.EasyRef, expected: Tensors) -> bool:
    """Whether a model makes the authors' tokens."""
    return error(tokens_of(model), expected["cond.reference_embeds"]) <= EXACT


# Names


def transformers_5(name: str) -> tuple[tuple[str, str], ...]:
    """Rules that give MLLM keys the names they have since transformers 4.52, under a prefix."""
    return (rf"^{name}model\.", rf"{name}model.language_model."), (
        rf"^{name}visual\.",
        rf"{name}model.visual.",
    )


VARIANTS: dict[str, Callable[[Tensors], Tensors]] = {
    "as released": lambda tensors: tensors,
    "module. in front": lambda tensors: renamed(tensors, ("^", "module.")),
    "MLLM as transformers 5 names it": lambda tensors: renamed(tensors, *transformers_5(r"multimodal_llm.")),
    "lm_head present": lambda tensors: tensors | {"multimodal_llm.lm_head.weight": torch.ones(416, 64)},
    "rotary buffers present": lambda tensors: (
        tensors
        | {
            "multimodal_llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "multimodal_llm.visual.rotary_pos_emb.inv_freq": torch.ones(4),
            "mllm_final_layer.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        }
    ),
    "the frozen UNet beside": lambda tensors: tensors | renamed(load_file(UNET_WEIGHTS), ("^", "unet.")),
    "adapters a second time": lambda tensors: (
        tensors
        | {
            "adapter_modules.1.to_k_ip.weight": torch.ones(32, 32),
            "adapter_modules.0.to_q_lora.down.weight": torch.ones(8, 32),
        }
    ),
}
UNET_WEIGHTS = golden.UNET / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_same_model_is_read(
    model: er.EasyRef, expected: Tensors, tmp_path: Path, variant: Callable[[Tensors], Tensors]
) -> None:
    loaded = load(write(tmp_path / "file.safetensors", variant(checkpoint_tensors())))
    assert is_golden(loaded, expected)
    assert same_unet_side(loaded, model)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_same_model_is_read_from_deepspeed(
    model: er.EasyRef, expected: Tensors, tmp_path: Path, variant: Callable[[Tensors], Tensors]
) -> None:
    loaded = load(write_deepspeed(tmp_path / "file.pt", variant(checkpoint_tensors())))
    assert is_golden(loaded, expected)
    assert same_unet_side(loaded, model)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_nothing_is_reported_as_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: Callable[[Tensors], Tensors]
) -> None:
    open_checkpoint(write(tmp_path / "file.safetensors", variant(checkpoint_tensors())), golden.MLLM)
    assert not caplog.records


def test_unknown_tensors_are_reported_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = checkpoint_tensors() | {"multimodal_llm.audio_tower.weight": torch.zeros(3)}
    opened = open_checkpoint(write(tmp_path / "more.safetensors", tensors), golden.MLLM)
    assert "1 unknown tensors were ignored, first ['multimodal_llm.audio_tower.weight']" in caplog.text
    assert "multimodal_llm.audio_tower.weight" not in {source.name for source in opened.sources.values()}


def same_unet_side(one: er.EasyRef, other: er.EasyRef) -> bool:
    """Whether two models hold equal K/V projections and LoRA."""
    states = [model.kv.state_dict() | model.checkpoint.lora() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_a_plain_state_dict_in_a_pt_file_is_read(expected: Tensors, tmp_path: Path) -> None:
    torch.save(checkpoint_tensors(), tmp_path / "plain.pt")
    assert is_golden(load(tmp_path / "plain.pt"), expected)


def test_a_pt_file_of_the_old_kind_is_read(expected: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"module": checkpoint_tensors()}, path, _use_new_zipfile_serialization=False)
    assert is_golden(load(path), expected)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "no suffix", "model.pt"])
def test_the_name_of_a_file_does_not_matter(expected: Tensors, tmp_path: Path, name: str) -> None:
    shutil.copy(golden.CHECKPOINT, tmp_path / name)
    assert is_golden(load(tmp_path / name), expected)


# Checkpoints of the alignment stage: the frozen MLLM is not in them


@pytest.fixture
def stage_1(tmp_path: Path) -> Path:
    return write(tmp_path / "stage_1.safetensors", without(checkpoint_tensors(), f"^{BODY}|_lora"))


def body_and_base(model: er.EasyRef) -> tuple[Tensors, Tensors]:
    """The model's decoder layers, and the base MLLM's, by the same names."""
    base = renamed(load_file(golden.MLLM / "model.safetensors"), (r"^model\.", ""))
    body = {name: t for name, t in model.mllm.encoder.state_dict().items() if not name.startswith("visual.")}
    return body, {name: t.float() for name, t in base.items() if not name.startswith("visual.")}


def test_a_stage_1_file_takes_its_body_from_the_base_mllm(stage_1: Path) -> None:
    body, base = body_and_base(load(stage_1))
    assert all(torch.equal(tensor, base[name]) for name, tensor in body.items())


def test_the_last_layer_of_the_base_mllm_is_left_out(stage_1: Path) -> None:
    body, base = body_and_base(load(stage_1))
    assert {name for name in base if name not in body} == {
        name for name in base if name.startswith("layers.3.")
    }


def test_a_stage_1_file_has_its_own_last_layer(stage_1: Path, model: er.EasyRef) -> None:
    ours, golden_layer = (m.mllm.aggregator.state_dict() for m in (load(stage_1), model))
    assert all(torch.equal(ours[name], golden_layer[name]) for name in golden_layer)


def test_the_checkpoints_body_wins_over_the_base_mllm(model: er.EasyRef) -> None:
    body, base = body_and_base(model)
    assert not torch.equal(body["layers.0.mlp.up_proj.weight"], base["layers.0.mlp.up_proj.weight"])


def test_a_stage_1_file_without_an_mllm_folder_asks_for_one(stage_1: Path) -> None:
    with pytest.raises(
        ValueError, match=r"stage_1.safetensors holds no MLLM weights.*Choose a folder.*Qwen2-VL-2B"
    ):
        er.load(stage_1, tokenizer=golden.MLLM)


def copy_of_base(folder: Path) -> Path:
    """The base MLLM's folder without its weights, to put others in."""
    return Path(shutil.copytree(golden.MLLM, folder, ignore=shutil.ignore_patterns("model.safetensors")))


def base_in_new_naming(folder: Path) -> Tensors:
    return renamed(load_file(golden.MLLM / "model.safetensors"), *transformers_5(""))


def test_the_base_mllm_may_be_named_as_transformers_5_names_it(stage_1: Path, tmp_path: Path) -> None:
    folder = copy_of_base(tmp_path / "mllm")
    write(folder / "model.safetensors", base_in_new_naming(folder))
    assert torch.equal(tokens_of(load(stage_1, folder)), tokens_of(load(stage_1)))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_base_mllm_may_lie_in_several_files(stage_1: Path, tmp_path: Path, kind: str) -> None:
    folder = copy_of_base(tmp_path / "mllm")
    tensors = load_file(golden.MLLM / "model.safetensors") | {"lm_head.weight": torch.zeros(416, 64)}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-{1 + i % 3:05}-of-00003.{kind}" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == part}
        (write if kind == "safetensors" else lambda path, t: torch.save(t, path))(folder / part, held)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    assert torch.equal(tokens_of(load(stage_1, folder)), tokens_of(load(stage_1)))


def test_other_pickles_beside_the_base_mllms_safetensors_are_left_alone(
    stage_1: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mllm"
    shutil.copytree(golden.MLLM, folder)
    torch.save({"arguments": Path("any object")}, folder / "training_args.bin")
    assert torch.equal(tokens_of(load(stage_1, folder)), tokens_of(load(stage_1)))


# LoRA


def test_a_file_without_lora_is_read(expected: Tensors, tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "no_lora.safetensors", without(checkpoint_tensors(), "_lora")))
    assert (loaded.config.lora_rank, loaded.checkpoint.lora()) == (0, {})
    assert is_golden(loaded, expected)


# Adapters by number


def training_adapters() -> Tensors:
    """What a training run keeps of a UNet of SDXL's depth, in widths of our tiny model: 140 numbered modules."""
    tensors: Tensors = {}
    for i in range(140):
        name = f"adapter_modules.{i}"
        for part in ("q", "k", "v", "out"):
            inward = 32 if i % 2 and part in "kv" else 4
            tensors[f"{name}.to_{part}_lora.down.weight"] = torch.full((2, inward), float(i))
            tensors[f"{name}.to_{part}_lora.up.weight"] = torch.full((4, 2), float(i))
        if i % 2:
            tensors |= {f"{name}.to_{part}_ip.weight": torch.full((4, 32), float(i)) for part in "kv"}
    return tensors


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> er.EasyRef:
    """A model whose adapters are stored by number alone."""
    path = tmp_path_factory.mktemp("training") / "numbered.safetensors"
    return load(write(path, without(checkpoint_tensors(), r"^unet\.") | training_adapters()))


def test_numbered_adapters_are_used_where_there_are_no_others(numbered: er.EasyRef) -> None:
    assert list(numbered.checkpoint.sites) == sdxl_sites()


def test_numbered_keys_and_values_land_at_their_sites(numbered: er.EasyRef) -> None:
    assert [weight[0, 0].item() for weight in numbered.kv.state_dict().values()][:70] == list(
        range(1, 140, 2)
    )


def test_numbered_lora_lands_at_its_attentions(numbered: er.EasyRef) -> None:
    lora = numbered.checkpoint.lora()
    attentions = [f"{site.diffusers}.{name}" for site in sdxl_sites() for name in ("attn1", "attn2")]
    assert [lora[f"{path}.processor.to_out_lora.up.weight"][0, 0] for path in attentions] == list(range(140))


# Our own format


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.safetensors"
    load(golden.CHECKPOINT).save(path)
    return path


def test_a_saved_file_has_the_released_keys(saved: Path) -> None:
    assert load_file(saved).keys() == checkpoint_tensors().keys()


def test_a_saved_file_has_the_released_values(saved: Path) -> None:
    released = checkpoint_tensors()
    assert all(
        torch.equal(tensor.to(torch.float16), released[name]) for name, tensor in load_file(saved).items()
    )


def test_a_saved_file_carries_the_sizes(saved: Path, model: er.EasyRef) -> None:
    assert open_checkpoint(saved).config == model.config


def test_saving_leaves_nothing_else_behind(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_save_that_fails_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        load(golden.CHECKPOINT).save(saved)
    assert saved.read_bytes() == before


def test_a_model_kept_in_the_files_own_dtype_can_be_saved(model: er.EasyRef, tmp_path: Path) -> None:
    er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.float16).save(tmp_path / "half.safetensors")
    assert load(tmp_path / "half.safetensors").fingerprint == model.fingerprint


def test_metadata_say_that_the_last_layer_is_bidirectional(tmp_path: Path) -> None:
    metadata = {METADATA_KEY: json.dumps({"causal": False})}
    path = write(tmp_path / "bidirectional.safetensors", checkpoint_tensors(), metadata)
    assert not open_checkpoint(path, golden.MLLM).config.causal


def test_the_user_wins_over_the_metadata(tmp_path: Path) -> None:
    metadata = {METADATA_KEY: json.dumps({"causal": False})}
    path = write(tmp_path / "bidirectional.safetensors", checkpoint_tensors(), metadata)
    assert open_checkpoint(path, golden.MLLM, causal=True).config.causal


def test_a_bidirectional_model_stays_so_when_saved(tmp_path: Path) -> None:
    er.load(golden.CHECKPOINT, golden.MLLM, causal=False).save(tmp_path / "saved.safetensors")
    assert not open_checkpoint(tmp_path / "saved.safetensors").config.causal


# Sizes come from the tensors


def test_the_number_of_tokens_is_read(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    tensors["mllm_final_layer.reference_tokens"] = torch.randn(5, 64)
    loaded = load(write(tmp_path / "five.safetensors", tensors))
    assert tokens_of(loaded).shape == (1, 5, 32)


def test_the_lora_rank_is_read(tmp_path: Path) -> None:
    tensors = {
        name: tensor[:3]
        if name.endswith("lora.down.weight")
        else tensor[:, :3]
        if "lora.up" in name
        else tensor
        for name, tensor in checkpoint_tensors().items()
    }
    assert open_checkpoint(write(tmp_path / "rank.safetensors", tensors), golden.MLLM).config.lora_rank == 3


def test_the_widths_of_projector_and_tokens_are_read(tmp_path: Path) -> None:
    tensors = {
        name: torch.randn(*tensor.shape[:-1], 48)
        if name.endswith(
            ("_ip.weight", "attn2.processor.to_k_lora.down.weight", "attn2.processor.to_v_lora.down.weight")
        )
        else tensor
        for name, tensor in checkpoint_tensors().items()
    }
    tensors |= {
        "image_proj_model.proj.0.weight": torch.randn(96, 64),
        "image_proj_model.proj.0.bias": torch.randn(96),
        "image_proj_model.proj.2.weight": torch.randn(48, 96),
        **{f"image_proj_model.proj.{name}": torch.randn(48) for name in ("2.bias", "3.weight", "3.bias")},
    }
    loaded = load(write(tmp_path / "wide.safetensors", tensors))
    assert (loaded.config.projector_width, tokens_of(loaded).shape) == (96, (1, 8, 48))


def folder_of_depth(folder: Path, layers: int) -> Path:
    """The MLLM folder, saying that the MLLM has so many layers."""
    copy_of_base(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return folder


def test_the_depth_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "shallow.safetensors", without(checkpoint_tensors(), r"model\.layers\.2\."))
    opened = open_checkpoint(path, folder_of_depth(tmp_path / "mllm", 3))
    assert (opened.config.body_layers, opened.config.final_layers) == (2, 1)


@pytest.fixture
def two_final_layers(tmp_path: Path, expected: Tensors) -> er.EasyRef:
    """The golden checkpoint with its body's last layer moved over to the final layers."""
    own, last = r"mllm_final_layer.layers.1.", r"mllm_final_layer.layers.0."
    tensors = renamed(
        checkpoint_tensors(),
        (r"mllm_final_layer\.layers\.0\.", own),
        (r"multimodal_llm\.model\.layers\.2\.", last),
    )
    return load(write(tmp_path / "two.safetensors", tensors))


def test_two_final_layers_are_read(two_final_layers: er.EasyRef) -> None:
    assert (two_final_layers.config.body_layers, two_final_layers.config.final_layers) == (2, 2)


@torch.inference_mode()
def test_of_two_final_layers_both_see_the_reference_tokens(two_final_layers: er.EasyRef) -> None:
    from easyref_core.mllm.qwen2_vl import text_rope

    aggregator = two_final_layers.mllm.aggregator
    context = torch.randn(1, 20, 64, generator=torch.manual_seed(0))
    x = torch.cat([context, aggregator.reference_tokens.weight[None]], dim=1)
    for layer in aggregator.layers:
        x = layer(x, text_rope(28, two_final_layers.config, x.device))
    assert error(aggregator.gather(context), aggregator.norm(x)[:, -8:]) <= EXACT


# config.json


@pytest.fixture
def rewritten(tmp_path: Path) -> Path:
    """The MLLM folder's config.json as the installed transformers writes it (5.x nests the text part), rope_theta 5e5."""
    from transformers import AutoConfig

    folder = copy_of_base(tmp_path / "mllm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_a_config_that_the_installed_transformers_wrote_is_read(rewritten: Path, model: er.EasyRef) -> None:
    found = open_checkpoint(golden.CHECKPOINT, rewritten).config
    assert found == dataclasses.replace(model.config, rope_theta=5e5)


# Dtypes


def test_a_model_in_bfloat16_makes_nearly_the_same_tokens(expected: Tensors) -> None:
    tokens = tokens_of(er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.bfloat16))
    cosine = torch.cosine_similarity(
        torch.Tensor(tokens).flatten(), expected["cond.reference_embeds"].flatten(), dim=0
    )
    assert cosine >= 0.999


def test_tokens_of_a_model_in_bfloat16_are_float32() -> None:
    assert tokens_of(er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_checkpoint_stored_in_bfloat16_is_read(model: er.EasyRef, tmp_path: Path) -> None:
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint_tensors().items()}
    tokens = tokens_of(load(write(tmp_path / "bf16.safetensors", stored)))
    assert error(tokens, tokens_of(model)) < 0.02


# Fingerprints


def test_the_fingerprint_is_the_same_from_every_format(
    model: er.EasyRef, saved: Path, tmp_path: Path
) -> None:
    deepspeed = write_deepspeed(tmp_path / "file.pt", checkpoint_tensors())
    assert load(deepspeed).fingerprint == load(saved).fingerprint == model.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        "mllm_final_layer.reference_tokens",
        "mllm_final_layer.norm.weight",
        "image_proj_model.proj.2.weight",
        "multimodal_llm.model.norm.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight",
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.processor.to_v_ip.weight",
        "unet.mid_block.attentions.0.transformer_blocks.1.attn1.processor.to_q_lora.up.weight",
        "mllm_final_layer.layers.0.mlp.up_proj.weight",
        "multimodal_llm.model.layers.1.self_attn.q_proj.weight",
        "multimodal_llm.visual.blocks.1.mlp.fc1.weight",
    ],
)
def test_the_fingerprint_is_another_for_other_weights(
    model: er.EasyRef, tmp_path: Path, changed: str
) -> None:
    tensors = checkpoint_tensors()
    tensors[changed] = tensors[changed] + 0.01
    assert load(write(tmp_path / "other.safetensors", tensors)).fingerprint != model.fingerprint
