"""Quirks of the authors' code that the released weights were trained with, each pinned against being "fixed".

Each test holds our result within 1e-5 of the authors' and the "fixed" variant far from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, Tensors, error, predict
from easyref_core.mllm import group_encoder, instructions, preprocess
from easyref_core.mllm.instructions import chat, image_token_id
from easyref_core.mllm.qwen2_vl import Rope, image_rope, rope_angles, text_rope
from easyref_core.tokens import aggregator
from easyref_core.utils.images import black_image

if TYPE_CHECKING:
    pass

FAR = 0.01  # a thousand times the difference of two correct implementations


@pytest.fixture
def distance(expected: Tensors) -> Callable[[er.EasyRef], float]:
    """Relative error of a model's last layer for the golden group."""

    @torch.inference_mode()
    def measure(model: er.EasyRef) -> float:
        model.clear_cache()  # of results from before the test changed something
        context = model.encode(golden.references(), golden.PROMPT, size=golden.SIZE)
        return error(model.mllm.aggregator.gather(context.states), expected["cond.reference_hidden_states"])

    return measure


# Images


def test_images_are_resized_twice(model: er.EasyRef, expected: Tensors, monkeypatch) -> None:
    def once(image, config, size):
        low, high = preprocess.pixel_limits(size, 28)
        height, width = preprocess.target_size(image.height, image.width, 28, low, high)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def pixel_error() -> float:
        patches, _ = preprocess.preprocess(golden.references(), model.config, golden.SIZE)
        return error(patches, expected["cond.pixel_values"])

    assert pixel_error() <= EXACT
    monkeypatch.setattr(preprocess, "resize", once)
    assert pixel_error() > FAR


@torch.inference_mode()
def test_no_attention_between_images(model: er.EasyRef, expected: Tensors) -> None:
    tower, wanted = model.mllm.encoder.visual, expected["cond.vision_features"]
    patches, grid = expected["cond.pixel_values"], expected["cond.image_grid_thw"]
    assert error(tower(patches, grid), wanted) <= EXACT
    x, rope = tower.patch_embed(patches), image_rope(grid, model.config, patches.device)
    for block in tower.blocks:
        x = block(x, rope, [len(patches)])  # all images as one
    assert error(tower.merger(x), wanted) > FAR


@torch.inference_mode()
def test_an_image_has_the_same_features_alone_and_in_a_group(model: er.EasyRef, expected: Tensors) -> None:
    patches, grid = expected["cond.pixel_values"], expected["cond.image_grid_thw"]
    first = int(grid[0].prod())
    group = model.mllm.encoder.visual(patches, grid)
    alone = model.mllm.encoder.visual(patches[:first], grid[:1])
    assert error(group[: first // 4], alone) <= EXACT


# The chat


def test_chat_is_the_system_turn_then_all_images_then_the_text() -> None:
    text = "".join(piece for piece, _ in chat("Describe:\na cat", [1, 2]))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "Describe:\na cat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def text_before_images(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    start = pieces.index(("<|vision_start|>", True))
    end = len(pieces) - pieces[::-1].index(("<|vision_end|>", True))
    return pieces[:start] + [pieces[end]] + pieces[start:end] + pieces[end + 1 :]


# The MLLM body


def mrope(ids: torch.Tensor, grid: torch.Tensor, image_token: int, config: er.model.EasyRefConfig) -> Rope:
    """Qwen2-VL's 3-D positions: image tokens at (frame, row, column), text continuing after the largest."""
    places, images, last = [], iter(grid.tolist()), -1
    flags = (ids[0] == image_token).tolist()
    at = 0
    while at < len(flags):
        if not flags[at]:
            places.append(torch.full((1, 3), last + 1))
            at += 1
        else:
            frames, rows, columns = next(images)
            axes = (torch.arange(frames), torch.arange(rows // 2), torch.arange(columns // 2))
            places.append(torch.cartesian_prod(*axes) + last + 1)
            at += len(places[-1])
        last = int(places[-1].max())
    position = torch.cat(places)
    angles = torch.stack(
        [rope_angles(position[:, axis], config.head_dim, config.rope_theta) for axis in range(3)]
    )
    sections = angles.split([2, 3, 3], dim=-1)  # mrope_section of the golden MLLM
    mixed = torch.cat([part[axis] for axis, part in enumerate(sections)], dim=-1)
    mixed = torch.cat([mixed, mixed], dim=-1)
    return mixed.cos(), mixed.sin()


def golden_mrope(model: er.EasyRef, expected: Tensors) -> Rope:
    ids, grid = expected["cond.input_ids"], expected["cond.image_grid_thw"]
    return mrope(ids, grid, image_token_id(model.tokenizer), model.config)


def test_mrope_of_three_equal_axes_is_plain_rope(model: er.EasyRef) -> None:
    text = torch.zeros(1, 50, dtype=torch.long)
    rope = mrope(text, torch.empty(0, 3), image_token_id(model.tokenizer), model.config)
    torch.testing.assert_close(rope, text_rope(50, model.config, text.device))


# The last layer


def test_the_last_layer_is_causal_by_default(model: er.EasyRef) -> None:
    assert model.config.causal


def test_bidirectional_last_layer_is_far_off(model: er.EasyRef, distance) -> None:
    assert distance(model) <= EXACT
    bidirectional = er.load(golden.CHECKPOINT, golden.MLLM, causal=False)
    assert distance(bidirectional) > FAR


def text_rope_restarted(length: int, config: er.model.EasyRefConfig, device: torch.device) -> Rope:
    """RoPE whose positions start again at the reference tokens."""
    parts = [text_rope(n, config, device) for n in (length - config.num_tokens, config.num_tokens)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


Change = Callable[[er.EasyRef, Tensors], tuple[object, str, object]]


def chat_changed(change: Callable[[list], list]) -> Change:
    return lambda *_: (instructions, "chat", lambda *args: change(chat(*args)))


# The attribute that is set, and the distance that the last layer then has at least.
CHANGES: dict[str, tuple[Change, float]] = {
    "no system turn": (chat_changed(lambda pieces: pieces[4:]), FAR),
    "text before images": (chat_changed(text_before_images), FAR),
    "no assistant header": (chat_changed(lambda pieces: pieces[:-2]), FAR),
    "no norm between body and last layer": (
        lambda model, _: (model.mllm.encoder.norm, "forward", lambda x: x),
        0.1,
    ),
    "M-RoPE of the images": (lambda *args: (group_encoder, "text_rope", lambda *_: golden_mrope(*args)), 0.1),
    "positions restart at the tokens": (lambda *_: (aggregator, "text_rope", text_rope_restarted), 0.1),
    "the body's norm after the last layer": (
        lambda model, _: (model.mllm.aggregator.norm, "forward", model.mllm.encoder.norm.forward),
        FAR,
    ),
}


@pytest.mark.parametrize(("change", "far"), CHANGES.values(), ids=CHANGES)
def test_change_is_far_off(
    model: er.EasyRef, expected: Tensors, distance, monkeypatch, change: Change, far: float
) -> None:
    assert distance(model) <= EXACT
    monkeypatch.setattr(*change(model, expected))
    assert distance(model) > far


# The unconditional input


def test_unconditional_input_is_a_black_image_and_the_bare_instruction(uncond, expected: Tensors) -> None:
    image, made = black_image(), uncond.provenance
    assert (image.size, image.getextrema()) == ((512, 512), ((0, 0), (0, 0), (0, 0)))
    assert (made.instruction, made.prompt, made.references) == (er.INSTRUCTION, "", 1)
    assert error(uncond, expected["uncond.reference_embeds"]) <= EXACT


@pytest.mark.parametrize(
    ("color", "text"),
    [("white", ("", er.INSTRUCTION)), ("black", (golden.PROMPT, er.INSTRUCTION)), ("black", ("", ""))],
)
def test_another_unconditional_input_is_far_off(model, expected: Tensors, color: str, text: tuple) -> None:
    tokens = model.aggregate(model.encode([Image.new("RGB", (512, 512), color)], *text, golden.SIZE))
    assert error(tokens, expected["uncond.reference_embeds"]) > FAR


# The UNet


UNET_CHANGES: dict[str, tuple[int, dict[str, float], dict[str, float]]] = {
    # rows of the noise prediction (the first is the unconditional one), settings as the authors', and changed
    "no LoRA at weight 0": (2, {"weight": 0.0}, {"weight": 0.0, "lora_strength": 0.0}),
    "no LoRA on the unconditional rows": (1, {}, {"lora_strength": 0.0}),
    "conditional tokens in all rows": (1, {}, {"uncond": "tokens"}),
}


@pytest.mark.parametrize(("rows", "right", "changed"), UNET_CHANGES.values(), ids=UNET_CHANGES)
def test_change_of_the_unet_is_far_off(
    unet, model, tokens, uncond, expected: Tensors, rows: int, right: dict, changed: dict
) -> None:
    def unet_error(uncond: er.ReferenceTokens = uncond, weight: float = 1.0, **settings: float) -> float:
        attached = er.diffusers_unet.apply(unet, model, tokens, uncond, weight, **settings)
        found, wanted = predict(unet, expected), expected[f"unet.noise_pred.scale_{weight}"]
        attached.remove()
        return error(found[:rows], wanted[:rows])

    changed = {name: tokens if value == "tokens" else value for name, value in changed.items()}
    assert unet_error(**right) <= EXACT
    assert unet_error(**changed) > FAR


# Not computed


def test_logits_are_never_computed(model: er.EasyRef) -> None:
    wide = [name for name, p in model.mllm.named_parameters() if model.config.vocab_size in p.shape]
    assert wide == ["encoder.embed_tokens.weight"]
