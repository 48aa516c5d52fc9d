"""Every method on tiny random models: what it paints, and that it leaves the base model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import easyref_core as er
from easyref_core.mrbench.methods import Method, Sampling, Task, build, check
from easyref_core.mrbench.methods import ip_adapter as ip
from easyref_core.mrbench.methods import ip_adapter_training as training
from easyref_core.mrbench.methods import lora as lora_file
from easyref_core.mrbench.methods.clip_pixels import clip_pixels, clip_pixels_of
from easyref_core.mrbench.methods.easyref import reference_tokens
from easyref_core.mrbench.methods.method import starting_noise
from easyref_core.training.base_model import BaseModel

from . import tiny
from .tiny import PICTURE, picture

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 1e-3  # relative error of one computation in another order, in float32 through the untrained UNet
SAMPLING = Sampling(size=PICTURE, steps=2, guidance=3.0, negative="")
TASKS = (
    Task("first", "a cat", tuple(picture(i) for i in range(2)), ("a", "b")),
    Task("second", "a dog", tuple(picture(i) for i in range(2, 5)), ("c", "d", "e")),
)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error, ||found - wanted|| / ||wanted||."""
    return ((found - wanted).norm() / wanted.norm()).item()


def bits(base: BaseModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in base.unet.state_dict().items()}


@contextmanager
def left_as_it_was(base: BaseModel) -> Iterator[None]:
    """Fails unless the UNet has the same weights, modules, processors, hooks and switches afterwards."""

    def modules() -> dict[str, int]:
        return {name: id(module) for name, module in base.unet.named_modules()}

    def switches() -> tuple:
        grads = {name: p.requires_grad for name, p in base.unet.named_parameters()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.unet.modules())
        return grads, hooks, base.unet.config.encoder_hid_dim_type, hasattr(base.unet, "peft_config")

    processors = {name: id(p) for name, p in base.unet.attn_processors.items()}
    before = bits(base), modules(), switches()
    yield
    after = bits(base)
    assert before[0].keys() == after.keys()
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert modules() == before[1]
    assert switches() == before[2]
    assert {name: id(p) for name, p in base.unet.attn_processors.items()} == processors


def generate_images(
    method: Method, tasks: tuple[Task, ...], folder: Path, seeds: tuple[int, ...] = (0,)
) -> list:
    conditions = [method.prepare(task, folder / task.id) for task in tasks]
    return method.generate_images(tasks, conditions, seeds, SAMPLING)


def pixels(image: Image.Image) -> bytes:
    assert image.size == (PICTURE, PICTURE)
    return image.tobytes()


@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_every_method_paints_and_leaves_the_base_bit_for_bit(
    name: str, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    with left_as_it_was(base):
        method = build(name, entries[name], base)
        for task in TASKS:
            (painted,) = generate_images(method, (task,), tmp_path, seeds=(0, 1))
            assert len({pixels(image) for image in painted}) == 2


@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_every_method_but_plain_sees_the_references(
    name: str, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    method = build(name, entries[name], base)
    other = Task("first", "a cat", TASKS[1].references[:2], ("a", "b"))
    ((a,),) = generate_images(method, TASKS[:1], tmp_path / "a")
    ((b,),) = generate_images(method, (other,), tmp_path / "b")
    assert (pixels(a) == pixels(b)) == (name == "plain")


@pytest.mark.parametrize("name", [name for name in tiny.ENTRIES if name != "lora"])
def test_groups_painted_together_are_those_painted_alone(
    name: str, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    method = build(name, entries[name], base)
    tasks = TASKS[0], Task("third", "a bird", TASKS[1].references[:2])
    assert method.together(tasks[0]) == method.together(tasks[1])
    seen = []

    def record(_module: object, _args: tuple, output: tuple) -> None:
        seen.append(output[0].detach())

    handle = base.unet.register_forward_hook(record)
    generate_images(method, tasks, tmp_path, seeds=(0, 1))
    together = seen[0]  # of the first step: unconditional rows, then conditional, each group by group
    for i, task in enumerate(tasks):
        seen.clear()
        generate_images(method, (task,), tmp_path, seeds=(0, 1))
        mine = torch.cat([half[2 * i : 2 * i + 2] for half in together.chunk(2)])
        assert error(mine, seen[0]) < CLOSE
    handle.remove()


def test_the_same_seed_is_the_same_noise_for_every_method_and_another_for_every_group() -> None:
    noise = starting_noise("first", 3, (4, 4, 4))
    assert torch.equal(noise, starting_noise("first", 3, (4, 4, 4)))
    assert not torch.equal(noise, starting_noise("second", 3, (4, 4, 4)))
    assert not torch.equal(noise, starting_noise("first", 4, (4, 4, 4)))


def test_every_method_starts_from_that_noise(
    base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyref_core.training import sampling

    given, plain = [], sampling.generate_images
    monkeypatch.setattr(
        sampling, "paint", lambda base, noise, *rest: given.append(noise) or plain(base, noise, *rest)
    )
    for name, entry in entries.items():
        generate_images(build(name, entry, base), TASKS[:1], tmp_path / name)
    assert len(given) == len(entries)
    assert all(torch.equal(noise, given[0]) for noise in given)
    assert torch.equal(given[0][0], starting_noise("first", 0, (4, PICTURE // 8, PICTURE // 8)))


def test_a_size_off_the_latent_grid_is_refused(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="36x36; wanted multiples of 8"):
        build("plain", {"kind": "plain"}, base).generate_images(TASKS[:1], [None], [0], Sampling(size=36))


class TestEasyRef:
    """One checkpoint, three ways from references to tokens."""

    @pytest.fixture
    def model(self) -> er.EasyRef:
        return er.load(tiny.CHECKPOINT, tiny.MLLM)

    def alone(self, model: er.EasyRef) -> list[Tensor]:
        def tokens(reference: Image.Image) -> Tensor:
            model.group_encoder.caches.clear()
            context = model.encode([reference], TASKS[1].prompt, size=tiny.REFERENCE)
            return model.aggregate(context).as_subclass(torch.Tensor)

        return [tokens(reference) for reference in TASKS[1].references]

    def test_average_is_the_mean_of_single_tokens(self, model: er.EasyRef) -> None:
        tokens = reference_tokens(model, TASKS[1], "average", er.INSTRUCTION, tiny.REFERENCE)
        torch.testing.assert_close(tokens, torch.cat(self.alone(model)).mean(dim=0, keepdim=True))

    def test_concatenation_is_single_tokens_side_by_side(self, model: er.EasyRef) -> None:
        tokens = reference_tokens(model, TASKS[1], "concatenation", er.INSTRUCTION, tiny.REFERENCE)
        assert torch.equal(tokens, torch.cat(self.alone(model), dim=1))
        assert tokens.shape[1] == 3 * model.config.num_tokens

    def test_tokens_of_a_task_do_not_depend_on_the_tasks_before(self, model: er.EasyRef) -> None:
        def tokens(task: Task) -> Tensor:
            return reference_tokens(model, task, "easyref", er.INSTRUCTION, tiny.REFERENCE)

        first = tokens(TASKS[0])
        tokens(Task("more", "a dog", [*TASKS[0].references, *TASKS[1].references]))
        assert torch.equal(tokens(TASKS[0]), first)

    def test_of_one_reference_all_three_are_the_same(self, model: er.EasyRef) -> None:
        task = Task("one", "a cat", TASKS[0].references[:1])
        made = [
            reference_tokens(model, task, how, er.INSTRUCTION, tiny.REFERENCE)
            for how in ("easyref", "average", "concatenation")
        ]
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])

    def test_repeating_the_unconditional_tokens_changes_nothing(
        self, model: er.EasyRef, base: BaseModel
    ) -> None:
        from easyref_core.unet import diffusers_unet

        black = model.unconditional(size=tiny.REFERENCE).as_subclass(torch.Tensor)
        once = predicted(base, lambda: diffusers_unet.apply(base.unet, model, black, None))
        thrice = predicted(base, lambda: diffusers_unet.apply(base.unet, model, black.repeat(1, 3, 1), None))
        assert error(thrice, once) < CLOSE

    def test_a_checkpoint_of_other_sizes_than_the_entry_says_is_refused(
        self, base: BaseModel, entries: dict[str, dict[str, Any]]
    ) -> None:
        with pytest.raises(ValueError, match="has tokens 8, the config entry says 32.*Name the checkpoint"):
            build("easyref", {**entries["easyref"], "tokens": 32}, base)
        with pytest.raises(ValueError, match="has final_layers 1, the config entry says 2"):
            build("easyref", {**entries["easyref"], "final_layers": 2}, base)


def predicted(base: BaseModel, attach: Any, **extra: Any) -> Tensor:
    """The UNet's answer to fixed noise and text under what `attach` returns."""
    text = base.encode_text(["a", "b"])
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    known = {"text_embeds": text.pooled, "time_ids": base.time_ids((32, 32), (0, 0), (32, 32), 2), **extra}
    attachment = attach()
    with torch.inference_mode():
        answer = base.unet(noise, 500, text.states, added_cond_kwargs=known).sample
    if hasattr(attachment, "remove"):
        attachment.remove()
    return answer


class TestIPAdapter:
    """diffusers' own adapter, and its training."""

    def test_the_file_loads_through_diffusers_own_loader_and_predicts_the_same(
        self, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
    ) -> None:
        from diffusers import StableDiffusionXLPipeline

        entry = entries["ip_adapter_average"]
        method = build("ip", entry, base)
        uncond, cond = method.prepare(TASKS[0], tmp_path)
        ours = predicted_with(base, method, [(uncond, cond)])
        pipeline = StableDiffusionXLPipeline(
            vae=base.vae,
            text_encoder=base.text_encoder,
            text_encoder_2=base.text_encoder_2,
            tokenizer=base.tokenizer,
            tokenizer_2=base.tokenizer_2,
            unet=base.unet,
            scheduler=base.schedule,
            add_watermarker=False,
        )
        weights = Path(entry["weights"])
        before = ip.bare(base.unet)
        pipeline.load_ip_adapter(
            str(weights.parent), subfolder="", weight_name=weights.name, image_encoder_folder=None
        )
        theirs = predicted(base, lambda: None, image_embeds=[torch.cat([uncond, cond])])
        ip._put(base.unet, before)
        assert torch.equal(ours, theirs)

    def test_the_plus_kind_reads_hidden_states_and_a_picture_of_zeros(
        self, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
    ) -> None:
        uncond, cond = build("ip", entries["ip_adapter_plus"], base).prepare(TASKS[1], tmp_path)
        # 24 pixels in patches of 8, and the class token
        assert uncond.shape == cond.shape == (1, 1, 1 + 3 * 3, 16)
        assert uncond.any()

    def test_average_is_of_the_embeddings_before_the_projection(
        self, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
    ) -> None:
        both = build("ip", entries["ip_adapter_concatenation"], base).prepare(TASKS[1], tmp_path)[1]
        mean = build("ip", entries["ip_adapter_average"], base).prepare(TASKS[1], tmp_path)[1]
        assert both.shape[:2] == (1, 3)
        torch.testing.assert_close(mean, both.mean(dim=1, keepdim=True))

    def test_concatenation_attends_to_the_tokens_of_all_references(
        self, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
    ) -> None:
        method = build("ip", entries["ip_adapter_concatenation"], base)
        conditions = method.prepare(TASKS[1], tmp_path)
        tokens = []
        layer = method.adapter.processors[
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
        ].to_k_ip[0]
        handle = layer.register_forward_hook(lambda _, args, out: tokens.append(out))
        predicted_with(base, method, [conditions])
        handle.remove()
        assert tokens[0].flatten(1, 2).shape[:2] == (2, 3 * training.TOKENS)

    def test_at_weight_0_the_base_answers(
        self, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
    ) -> None:
        method = build("ip", {**entries["ip_adapter_average"], "weight": 0.0}, base)
        answer = predicted_with(base, method, [method.prepare(TASKS[0], tmp_path)])
        assert error(answer, predicted(base, lambda: None)) < CLOSE

    def test_it_starts_from_the_text_s_keys_and_values(self, base: BaseModel) -> None:
        state = training.initial_adapter(base.unet, 16)
        first = next(m for name, m in base.unet.named_modules() if name.endswith("attn2"))
        assert torch.equal(state["ip_adapter"]["1.to_k_ip.weight"], first.to_k.weight)
        assert len(state["ip_adapter"]) == 2 * len(base.unet.attn_processors) // 2

    def test_training_lowers_the_loss_and_trains_nothing_else(
        self, base: BaseModel, image_encoder: torch.nn.Module, tmp_path: Path
    ) -> None:
        encoder = {name: t.clone() for name, t in image_encoder.state_dict().items()}
        with left_as_it_was(base):
            losses = training.train_ip_adapter(
                base, image_encoder, tiny.OnePicture(), tmp_path / "a.safetensors", steps=30, batch=4, lr=3e-3
            )
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
        assert all(torch.equal(encoder[name], t) for name, t in image_encoder.state_dict().items())
        trained, new = ip.read_adapter(tmp_path / "a.safetensors"), training.initial_adapter(base.unet, 16)
        assert trained["ip_adapter"].keys() == new["ip_adapter"].keys()
        assert all(not torch.equal(t, new["ip_adapter"][name]) for name, t in trained["ip_adapter"].items())

    def test_drops_come_at_their_rates_from_each_row_s_seed(self) -> None:
        drawn = training.draw(torch.arange(4000), (1, 1, 1), 1000, 0.05)
        image, text = drawn.no_image, drawn.no_text
        for rate in ((image & ~text), (text & ~image), (image & text)):
            assert abs(rate.float().mean().item() - 0.05) < 0.012
        again = training.draw(torch.tensor([7]), (1, 1, 1), 1000, 0.05)
        assert torch.equal(again.noise[0], drawn.noise[7])

    def test_latents_alone_are_refused(
        self, base: BaseModel, image_encoder: torch.nn.Module, tmp_path: Path
    ) -> None:
        source = tiny.OnePicture(latents=True)
        with pytest.raises(ValueError, match="image encoder needs pixels"):
            training.train_ip_adapter(base, image_encoder, source, tmp_path / "a.safetensors", steps=1)

    def test_a_file_that_is_no_ip_adapter_is_refused(self) -> None:
        with pytest.raises(ValueError, match="wanted image_proj and ip_adapter"):
            ip.read_adapter(tiny.CHECKPOINT)
        with pytest.raises(FileNotFoundError, match="no IP-Adapter at"):
            ip.read_adapter(Path("nowhere.safetensors"))


def predicted_with(base: BaseModel, method: Method, conditions: list) -> Tensor:
    """The UNet's answer for a batch of one unconditional and one conditional row."""
    with torch.inference_mode(), method.attach(conditions, 1):
        return predicted(base, lambda: None)


class TestLoRA:
    """A training of the group's own."""

    def test_it_learns(self, base: BaseModel) -> None:
        with left_as_it_was(base):
            _, losses = lora_file.train(
                base, [picture(1)], ["a cat"], PICTURE, rank=8, steps=50, lr=5e-2, batch=8, seed=0
            )
        assert sum(losses[-10:]) < 0.92 * sum(losses[:10])

    def test_the_same_group_gives_the_same_lora(self, base: BaseModel) -> None:
        def once() -> dict:
            return lora_file.train(base, [picture(1)], [""], PICTURE, 2, 2, 1e-3, 2, seed=5)[0]

        first, second = once(), once()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_it_is_trained_once(
        self,
        base: BaseModel,
        entries: dict[str, dict[str, Any]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        method = build("lora", entries["lora"], base)
        ((first,),) = generate_images(method, TASKS[:1], tmp_path)
        monkeypatch.setattr(lora_file, "train", None)
        ((second,),) = generate_images(method, TASKS[:1], tmp_path)
        assert pixels(first) == pixels(second)

    def test_references_without_captions_are_refused_where_captions_are_wanted(
        self, base: BaseModel, entries: dict[str, dict[str, Any]], tmp_path: Path
    ) -> None:
        method = build("lora", {**entries["lora"], "captions": "references"}, base)
        with pytest.raises(ValueError, match="Group x has 0 captions for 2 references"):
            method.prepare(Task("x", "", TASKS[0].references), tmp_path)


class TestEntries:
    """Config entries, checked before anything is loaded."""

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"kind": "lorra"}, "Method m: kind is 'lorra'; wanted one of plain, easyref, ip_adapter, lora"),
            ({"kind": "lora", "ranks": 4}, "Method m: unknown ranks. lora knows size, rank, "),
            ({"kind": "easyref"}, "Method m: checkpoint missing"),
            ("plain", "Method m: kind is 'plain'"),
        ],
    )
    def test_a_wrong_entry_is_refused(self, entry: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check("m", entry)


def test_clip_pixels_of_a_picture_of_the_right_size_are_only_normalised() -> None:
    made = clip_pixels([picture(3, side=24)], 24)
    tensor = torch.from_numpy(np.array(picture(3, side=24))).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(made, clip_pixels_of(tensor, 24))


def test_clip_pixels_are_those_of_clip_s_own_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(3, side=40).crop((0, 0, 40, 30))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    theirs = torch.as_tensor(processor(image, return_tensors="pt").pixel_values)
    torch.testing.assert_close(clip_pixels([image], 24), theirs, atol=1e-5, rtol=1e-5)
