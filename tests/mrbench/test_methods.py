"""Every method on tiny random models: its images, and that it restores the base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import easyref_core as er
from easyref_core.mrbench.methods import Method, Sampling, Task, check
from easyref_core.mrbench.methods import ip_adapter as ip
from easyref_core.mrbench.methods import ip_adapter_training as training
from easyref_core.mrbench.methods.clip_pixels import clip_pixels, clip_pixels_of
from easyref_core.mrbench.methods.easyref import reference_tokens
from easyref_core.mrbench.methods.finite import NotFiniteError, tensors_of
from easyref_core.mrbench.methods.lora import LoRAMethod
from easyref_core.mrbench.methods.method import initial_noise
from easyref_core.training.base_model import BaseModel
from easyref_core.unet import diffusers_unet

from . import tiny
from .tiny import IMAGE_SIZE, random_image

MakeMethod = Callable[..., Method]

TOLERANCE = 1e-3  # relative error of another order of computation, in float32 through the untrained UNet
SAMPLING = Sampling(size=IMAGE_SIZE, steps=2, guidance=3.0, negative="")
TASKS = (
    Task("first", "a cat", tuple(random_image(i) for i in range(2)), ("a", "b")),
    Task("second", "a dog", tuple(random_image(i) for i in range(2, 5)), ("c", "d", "e")),
)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error, ||actual - expected|| / ||expected||."""
    return ((actual - expected).norm() / expected.norm()).item()


def predict(base: BaseModel, **added: Any) -> Tensor:
    """The UNet's prediction for fixed noise and text."""
    text = base.encode_text(["a", "b"])
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    added |= {"text_embeds": text.pooled, "time_ids": base.time_ids((32, 32), (0, 0), (32, 32), 2)}
    with torch.inference_mode():
        return base.unet(noise, 500, text.states, added_cond_kwargs=added).sample


def predict_with(method: Method, condition: Any) -> Tensor:
    """The same for one unconditional and one conditional row of a method."""
    with torch.inference_mode(), method.attach([condition], 1):
        return predict(method.base)


@contextmanager
def restored(base: BaseModel) -> Iterator[None]:
    """Fails unless the UNet has the same weights, modules, processors, inputs and prediction afterwards."""

    def state() -> tuple:
        unet = base.unet
        modules = {name: id(module) for name, module in unet.named_modules()}
        processors = {name: id(processor) for name, processor in unet.attn_processors.items()}
        gradients = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
        inputs: list[str] = []  # with those that a leftover hook would add
        handle = unet.register_forward_hook(
            lambda _, args, kwargs, out: inputs.extend(kwargs["added_cond_kwargs"]), with_kwargs=True
        )
        predict(base)
        handle.remove()
        kind = unet.config.encoder_hid_dim_type
        return modules, processors, gradients, inputs, kind, hasattr(unet, "peft_config")

    def tensors() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in base.unet.state_dict().items()} | {"": predict(base)}

    before, weights = state(), tensors()
    yield
    assert state() == before
    after = tensors()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in after)


def generate(
    method: Method, tasks: tuple[Task, ...], folder: Path, seeds: tuple[int, ...] = (0,)
) -> list[list[bytes]]:
    """Pixels of the images of each task."""
    conditions = [method.prepare(task, folder / task.id) for task in tasks]
    images = method.generate(tasks, conditions, seeds, SAMPLING)
    assert {image.size for row in images for image in row} == {(IMAGE_SIZE, IMAGE_SIZE)}
    return [[image.tobytes() for image in row] for row in images]


@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_every_method_generates_and_restores_the_base(
    name: str, base: BaseModel, make_method: MakeMethod, tmp_path: Path
) -> None:
    with restored(base):
        method = make_method(name)
        for task in TASKS:
            (images,) = generate(method, (task,), tmp_path, seeds=(0, 1))
            assert len(set(images)) == 2


@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_every_method_but_plain_uses_the_references(
    name: str, make_method: MakeMethod, tmp_path: Path
) -> None:
    method = make_method(name)
    other = Task("first", "a cat", TASKS[1].references[:2], ("a", "b"))
    a, b = generate(method, TASKS[:1], tmp_path / "a"), generate(method, (other,), tmp_path / "b")
    assert (a == b) == (name == "plain")


@pytest.mark.parametrize("name", [name for name in tiny.ENTRIES if name != "lora"])
def test_a_batch_of_groups_equals_single_groups(name: str, make_method: MakeMethod, tmp_path: Path) -> None:
    method = make_method(name)
    tasks = TASKS[0], Task("third", "a bird", TASKS[1].references[:2])
    assert method.batch_key(tasks[0]) == method.batch_key(tasks[1])
    outputs = []
    handle = method.base.unet.register_forward_hook(lambda _, args, out: outputs.append(out[0].detach()))
    generate(method, tasks, tmp_path, seeds=(0, 1))
    batch = outputs[0]  # of the first step: unconditional rows, then conditional, each group by group
    for i, task in enumerate(tasks):
        outputs.clear()
        generate(method, (task,), tmp_path, seeds=(0, 1))
        rows = torch.cat([half[2 * i : 2 * i + 2] for half in batch.chunk(2)])
        assert error(rows, outputs[0]) < TOLERANCE
    handle.remove()


def test_noise_depends_on_group_and_seed_only() -> None:
    noise = initial_noise("first", 3, (4, 4, 4))
    assert torch.equal(noise, initial_noise("first", 3, (4, 4, 4)))
    assert not torch.equal(noise, initial_noise("second", 3, (4, 4, 4)))
    assert not torch.equal(noise, initial_noise("first", 4, (4, 4, 4)))


def test_every_method_starts_from_that_noise(
    make_method: MakeMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyref_core.training import sampling

    noises, generate_latents = [], sampling.generate_latents

    def record(base: BaseModel, noise: Tensor, *args: Any, **options: Any) -> Tensor:
        noises.append(noise)
        return generate_latents(base, noise, *args, **options)

    monkeypatch.setattr(sampling, "generate_latents", record)
    for name in tiny.ENTRIES:
        generate(make_method(name), TASKS[:1], tmp_path / name)
    assert len(noises) == len(tiny.ENTRIES)
    expected = initial_noise("first", 0, (4, IMAGE_SIZE // 8, IMAGE_SIZE // 8))
    assert all(torch.equal(noise[0], expected) for noise in noises)


def test_a_size_off_the_latent_grid_is_refused(make_method: MakeMethod) -> None:
    with pytest.raises(ValueError, match="36x36; wanted multiples of 8"):
        make_method("plain").generate(TASKS[:1], [None], [0], Sampling(size=36))


class TestEasyRef:
    """Three ways from references to tokens with one checkpoint."""

    @pytest.fixture
    def model(self) -> er.EasyRef:
        return er.load(tiny.CHECKPOINT, tiny.MLLM)

    def tokens(self, model: er.EasyRef, task: Task, aggregation: str = "easyref") -> Tensor:
        return reference_tokens(model, task, aggregation, er.INSTRUCTION, tiny.REFERENCE)

    def test_average_and_concatenation_are_of_single_tokens(self, model: er.EasyRef) -> None:
        tasks = [Task("", TASKS[1].prompt, (reference,)) for reference in TASKS[1].references]
        single = [self.tokens(model, task) for task in tasks]
        average, tokens = (self.tokens(model, TASKS[1], name) for name in ("average", "concatenation"))
        torch.testing.assert_close(average, torch.cat(single).mean(dim=0, keepdim=True))
        assert torch.equal(tokens, torch.cat(single, dim=1))
        assert tokens.shape[1] == 3 * model.config.num_tokens

    def test_tokens_do_not_depend_on_earlier_tasks(self, model: er.EasyRef) -> None:
        first = self.tokens(model, TASKS[0])
        self.tokens(model, Task("more", "a dog", (*TASKS[0].references, *TASKS[1].references)))
        assert torch.equal(self.tokens(model, TASKS[0]), first)

    def test_all_three_are_equal_for_one_reference(self, model: er.EasyRef) -> None:
        task = Task("one", "a cat", TASKS[0].references[:1])
        first, *others = (self.tokens(model, task, name) for name in ("easyref", "average", "concatenation"))
        assert all(torch.equal(first, other) for other in others)

    def test_repeating_the_unconditional_tokens_changes_nothing(
        self, model: er.EasyRef, base: BaseModel
    ) -> None:
        black = model.unconditional(size=tiny.REFERENCE).as_subclass(torch.Tensor)
        predictions = []
        for tokens in (black, black.repeat(1, 3, 1)):
            attachment = diffusers_unet.apply(base.unet, model, tokens, None)
            predictions.append(predict(base))
            attachment.remove()
        assert error(*predictions) < TOLERANCE

    def test_a_checkpoint_of_another_size_is_refused(self, make_method: MakeMethod) -> None:
        with pytest.raises(ValueError, match="has tokens 8, the config entry says 32.*Name the checkpoint"):
            make_method("easyref", tokens=32)
        with pytest.raises(ValueError, match="has final_layers 1, the config entry says 2"):
            make_method("easyref", final_layers=2)


class TestIPAdapter:
    """diffusers' own adapter, and its training."""

    def test_predicts_the_same_as_diffusers_own_pipeline(
        self, base: BaseModel, make_method: MakeMethod, tmp_path: Path
    ) -> None:
        from diffusers import StableDiffusionXLPipeline

        method = make_method("ip_adapter_average")
        uncond, cond = method.prepare(TASKS[0], tmp_path)
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
        parts = {name: getattr(base, name) for name in names}
        pipeline = StableDiffusionXLPipeline(**parts, scheduler=base.schedule, add_watermarker=False)
        weights = Path(method.weights)
        with ip.attached(base.unet, ip.current_adapter(base.unet)):
            pipeline.load_ip_adapter(
                str(weights.parent), subfolder="", weight_name=weights.name, image_encoder_folder=None
            )
            expected = predict(base, image_embeds=[torch.cat([uncond, cond])])
        assert torch.equal(predict_with(method, (uncond, cond)), expected)

    def test_plus_uses_hidden_states_and_a_zero_image(self, make_method: MakeMethod, tmp_path: Path) -> None:
        uncond, cond = make_method("ip_adapter_plus").prepare(TASKS[1], tmp_path)
        # 32 pixels in patches of 8, and the class token
        assert uncond.shape == cond.shape == (1, 1, 1 + 4 * 4, tiny.WIDTH)
        assert uncond.any()

    def test_average_is_of_the_embeddings_before_the_projection(
        self, make_method: MakeMethod, tmp_path: Path
    ) -> None:
        _, each = make_method("ip_adapter_concatenation").prepare(TASKS[1], tmp_path)
        _, mean = make_method("ip_adapter_average").prepare(TASKS[1], tmp_path)
        assert each.shape[:2] == (1, 3)
        torch.testing.assert_close(mean, each.mean(dim=1, keepdim=True))

    def test_concatenation_attends_to_the_tokens_of_all_references(
        self, make_method: MakeMethod, tmp_path: Path
    ) -> None:
        method = make_method("ip_adapter_concatenation")
        tokens = []
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
        layer = method.adapter.processors[name].to_k_ip[0]
        handle = layer.register_forward_hook(lambda _, args, out: tokens.append(out))
        predict_with(method, method.prepare(TASKS[1], tmp_path))
        handle.remove()
        assert tokens[0].flatten(1, 2).shape[:2] == (2, 3 * training.TOKENS)

    def test_weight_0_is_the_base(self, base: BaseModel, make_method: MakeMethod, tmp_path: Path) -> None:
        method = make_method("ip_adapter_average", weight=0.0)
        assert error(predict_with(method, method.prepare(TASKS[0], tmp_path)), predict(base)) < TOLERANCE

    def test_it_starts_from_the_keys_and_values_of_the_text(self, base: BaseModel) -> None:
        state = training.initial_adapter(base.unet, tiny.PROJECTION)
        first = next(m for name, m in base.unet.named_modules() if name.endswith("attn2"))
        assert torch.equal(state["ip_adapter"]["1.to_k_ip.weight"], first.to_k.weight)
        assert len(state["ip_adapter"]) == 2 * len(base.unet.attn_processors) // 2

    def test_training_lowers_the_loss_and_changes_nothing_else(
        self, base: BaseModel, image_encoder: torch.nn.Module, tmp_path: Path
    ) -> None:
        encoder = {name: t.clone() for name, t in image_encoder.state_dict().items()}
        file, settings = tmp_path / "a.safetensors", training.IPAdapterTraining(steps=30, batch=4, lr=3e-3)
        with restored(base):
            losses = training.train_ip_adapter(base, image_encoder, tiny.OneImage(), file, settings)
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
        assert all(torch.equal(encoder[name], t) for name, t in image_encoder.state_dict().items())
        trained, new = ip.load_state(file), training.initial_adapter(base.unet, tiny.PROJECTION)
        assert trained["ip_adapter"].keys() == new["ip_adapter"].keys()
        assert all(not torch.equal(t, new["ip_adapter"][name]) for name, t in trained["ip_adapter"].items())

    def test_drop_rates_and_the_seed_of_each_row(self) -> None:
        drawn = training.draw(torch.arange(4000), (1, 1, 1), 1000, 0.05)
        image, text = drawn.no_image, drawn.no_text
        for dropped in ((image & ~text), (text & ~image), (image & text)):
            assert abs(dropped.float().mean().item() - 0.05) < 0.012
        again = training.draw(torch.tensor([7]), (1, 1, 1), 1000, 0.05)
        assert torch.equal(again.noise[0], drawn.noise[7])

    def test_latents_alone_are_refused(
        self, base: BaseModel, image_encoder: torch.nn.Module, tmp_path: Path
    ) -> None:
        images, settings = tiny.OneImage(latents=True), training.IPAdapterTraining(steps=1)
        with pytest.raises(ValueError, match="image encoder needs pixels"):
            training.train_ip_adapter(base, image_encoder, images, tmp_path / "a.safetensors", settings)

    def test_a_file_of_another_kind_is_refused(self) -> None:
        with pytest.raises(ValueError, match="wanted image_proj and ip_adapter"):
            ip.load_state(tiny.CHECKPOINT)
        with pytest.raises(FileNotFoundError, match="no IP-Adapter at"):
            ip.load_state(Path("nowhere.safetensors"))


class TestLoRA:
    """A LoRA for each group."""

    def test_it_learns(self, base: BaseModel, make_method: MakeMethod) -> None:
        with restored(base):
            method = make_method("lora", rank=8, steps=50, lr=5e-2, batch=8)
            _, losses = method.train([random_image(1)], ["a cat"], seed=0)
        assert sum(losses[-10:]) < 0.92 * sum(losses[:10])

    def test_the_same_group_gives_the_same_lora(self, make_method: MakeMethod) -> None:
        method = make_method("lora", lr=1e-3)
        first, second = (method.train([random_image(1)], [""], seed=5)[0] for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_it_is_trained_once(
        self, make_method: MakeMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = make_method("lora")
        first = generate(method, TASKS[:1], tmp_path)
        monkeypatch.setattr(LoRAMethod, "train", None)
        assert generate(method, TASKS[:1], tmp_path) == first

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_it_trains_in_float32_on_a_half_base(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Losses follow those of a float32 base; AdamW on float16 weights gave NaN from the second step."""
        folder = tiny.make_base(tmp_path)
        trained = {}
        for kind in (torch.float32, dtype):
            method = LoRAMethod(BaseModel.load(folder, dtype=kind), size=IMAGE_SIZE, rank=2, steps=6, lr=1e-2)
            trained[kind] = method.train([random_image(1)], [""], seed=0)
        assert {tensor.dtype for tensor in trained[dtype][0].values()} == {torch.float32}
        assert trained[dtype][1] == pytest.approx(trained[torch.float32][1], rel=0.02)
        generate(method, TASKS[:1], tmp_path / "out")

    def test_missing_captions_are_refused(self, make_method: MakeMethod, tmp_path: Path) -> None:
        method = make_method("lora", captions="references")
        with pytest.raises(ValueError, match="Group x has 0 captions for 2 references"):
            method.prepare(Task("x", "", TASKS[0].references), tmp_path)


class TestNotFinite:
    """A value that is not finite stops every method, before anything is saved."""

    def test_a_loss(self, make_method: MakeMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nothing = torch.nn.functional.mse_loss
        monkeypatch.setattr(torch.nn.functional, "mse_loss", lambda *args: nothing(*args) * math.nan)
        expected = r"lora, group first, step 0: the loss is not finite \(1 values .* Lower lr, or set"
        with pytest.raises(NotFiniteError, match=expected):
            make_method("lora").prepare(TASKS[0], tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_trained_weight(
        self, make_method: MakeMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def break_weights(self: torch.optim.Optimizer, *args: Any) -> None:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

        monkeypatch.setattr(torch.optim.AdamW, "step", break_weights)
        with pytest.raises(NotFiniteError, match="lora, group first, after 1 steps: the trained LoRA is not"):
            make_method("lora", steps=1).prepare(TASKS[0], tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_cached_lora(self, make_method: MakeMethod, tmp_path: Path) -> None:
        method = make_method("lora")
        method.prepare(TASKS[0], tmp_path)
        (file,) = tmp_path.iterdir()
        lora = safetensors.torch.load_file(file)
        safetensors.torch.save_file({name: t * math.nan for name, t in lora.items()}, file)
        with pytest.raises(
            NotFiniteError, match="the cached LoRA is not finite.* Delete .*lora.safetensors to"
        ):
            method.prepare(TASKS[0], tmp_path)

    @pytest.mark.parametrize("weights", [False, True])
    def test_the_training_of_an_ip_adapter(
        self,
        weights: bool,
        base: BaseModel,
        image_encoder: torch.nn.Module,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        images = tiny.OneImage()
        if weights:
            broken = {"image_proj": {"proj.weight": torch.tensor([math.nan])}}
            monkeypatch.setattr(training, "adapter_state", lambda adapter: broken)
        else:
            images.pixels = images.pixels * math.nan
        expected = (
            "after 1 steps: the trained adapter is not" if weights else "step 0: the loss is not finite"
        )
        file = tmp_path / "a.safetensors"
        with pytest.raises(NotFiniteError, match=f"ip_adapter, {expected}.* Lower lr"):
            training.train_ip_adapter(base, image_encoder, images, file, training.IPAdapterTraining(steps=1))
        assert not file.exists()

    @pytest.mark.parametrize("name", ["easyref", "ip_adapter_average", "lora"])
    def test_a_condition(self, name: str, make_method: MakeMethod, tmp_path: Path) -> None:
        method = make_method(name)
        condition = method.prepare(TASKS[0], tmp_path)
        tensors = list(tensors_of(condition))
        with torch.inference_mode():
            tensors[-1].view(-1)[0] = math.nan
        expected = rf"{method.kind}, group first: the condition is not finite \(1 values"
        with pytest.raises(NotFiniteError, match=expected):
            method.generate(TASKS[:1], [condition], [0], SAMPLING)

    @pytest.mark.parametrize(("part", "what"), [("unet", "latent"), ("vae", "decoded image")])
    def test_a_latent_and_a_decoded_image(
        self, part: str, what: str, base: BaseModel, make_method: MakeMethod
    ) -> None:
        module = base.unet.conv_out if part == "unet" else base.vae.decoder.conv_out
        handle = module.register_forward_hook(lambda *args: args[-1] * math.nan)
        try:
            with pytest.raises(NotFiniteError, match=f"plain, group first, seed 4: the {what} is not finite"):
                make_method("plain").generate(TASKS[:1], [None], [4], SAMPLING)
        finally:
            handle.remove()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "lorra"}, "Method m: kind is 'lorra'; wanted one of plain, easyref, ip_adapter, lora"),
        ({"kind": "lora", "ranks": 4}, "Method m of kind lora has unknown keys: ranks. Known are batch, "),
        ({"kind": "easyref"}, "Method m of kind easyref lacks checkpoint"),
        ("plain", "Method m: kind is 'plain'"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_is_loaded(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check("m", entry)


def test_clip_pixels_of_an_image_of_the_right_size_are_only_normalised() -> None:
    image = random_image(3, side=24)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(clip_pixels([image], 24), clip_pixels_of(tensor, 24))


def test_clip_pixels_equal_those_of_transformers() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = random_image(3, side=40).crop((0, 0, 40, 30))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = torch.as_tensor(processor(image, return_tensors="pt").pixel_values)
    torch.testing.assert_close(clip_pixels([image], 24), expected, atol=1e-5, rtol=1e-5)
