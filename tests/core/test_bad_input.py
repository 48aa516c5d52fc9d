"""References, texts, tokens and UNets that do not fit raise one clear error; other images are converted."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

import easyref_core as er
from devkit import golden
from devkit.golden import checkpoint_tensors, write
from easyref_core.mllm.instructions import tokenize
from easyref_core.utils.images import to_rgb

from .errors import assert_refused, assert_says, error_of, folder_with

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


# References


def test_no_reference(model: er.EasyRef) -> None:
    parts = "The group holds no reference", "Give it at least one image"
    assert_refused(lambda: model.encode([], golden.PROMPT), *parts)


def color() -> Image.Image:
    return golden.references()[0].convert("RGB")


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


# an image, and the mode that it has the colours of
CONVERTED: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "RGBA": (lambda image: with_alpha(image, "RGBA"), "RGB"),
    "grey": (lambda image: image.convert("L"), "L"),
    "grey with alpha": (lambda image: with_alpha(image, "LA"), "L"),
    "black and white": (lambda image: image.convert("1"), "1"),
    "16 bits": (lambda image: sixteen_bits(image), "L"),
    "16 bits in 32": (lambda image: Image.fromarray(np.asarray(sixteen_bits(image)).astype(np.int32)), "L"),
}


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode with alpha, half of it transparent."""
    image = image.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(("convert", "mode"), CONVERTED.values(), ids=CONVERTED)
def test_pil_images_of_every_mode_are_converted(convert: Callable, mode: str) -> None:
    assert np.array_equal(to_rgb(convert(color())), color().convert(mode).convert("RGB"))


def test_palette_is_converted() -> None:
    palette = color().quantize(16)
    assert np.array_equal(to_rgb(palette), palette.convert("RGB"))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB")])
def test_tensors_of_one_three_and_four_channels_are_converted(channels: int, mode: str) -> None:
    rgba = golden.as_tensor(with_alpha(color(), "RGBA"))
    grey = golden.as_tensor(color().convert("L"))[..., None]
    tensor = grey if channels == 1 else rgba[..., :channels]
    assert np.array_equal(to_rgb(tensor), color().convert(mode).convert("RGB"))


def test_values_beyond_0_and_1_are_clipped() -> None:
    beyond = torch.tensor([-0.5, 0.5, 1.5]).expand(20, 20, 3)
    assert to_rgb(beyond).getpixel((0, 0)) == (0, 128, 255)


PATCH = "smaller than one patch of the vision tower (14x14). Use a larger image"
FORM = "wanted (height, width, channels) with 1, 3 or 4 channels. Pass the images of a batch one by one"
NUMBERS = "holds 1200 values that are NaN or infinite"
VALUES = "wanted one that holds its values"
UNUSABLE: dict[str, tuple[Image.Image | torch.Tensor, str, str]] = {
    "1x1": (Image.new("RGB", (1, 1)), "is 1x1 pixels", PATCH),
    "1x4000": (Image.new("RGB", (1, 4000)), "is 1x4000 pixels", PATCH),
    "1x4000 tensor": (torch.zeros(4000, 1, 3), "is 1x4000 pixels", PATCH),
    "13x60": (Image.new("RGB", (13, 60)), "is 13x60 pixels", PATCH),
    "no rows": (torch.zeros(0, 20, 3), "is 20x0 pixels", PATCH),
    "thin": (Image.new("RGB", (14, 2801)), "14x2801 pixels", "is more than 200 times the other. Crop it"),
    "NaN": (torch.full((20, 20, 3), torch.nan), NUMBERS, "Check the node"),
    "inf": (torch.full((20, 20, 3), torch.inf), NUMBERS, "Check the node"),
    "batch": (torch.zeros(2, 20, 20, 3), "has shape (2, 20, 20, 3)", FORM),
    "no channels": (torch.zeros(20, 20), "has shape (20, 20)", FORM),
    "two channels": (torch.zeros(20, 20, 2), "has shape (20, 20, 2)", FORM),
    "meta": (torch.zeros(20, 20, 3, device="meta"), "on meta", VALUES),
    "sparse": (torch.zeros(20, 20, 3).to_sparse(), "sparse", VALUES),
    "LAB": (Image.new("La", (20, 20)), "of PIL's mode La, cannot be read as RGB", "wanted any mode"),
    "bytes": (torch.zeros(20, 20, 3).byte(), "holds torch.uint8 values", "floats in 0..1. Divide 0..255"),
}


@pytest.mark.parametrize(("image", "found", "wanted"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_image(
    model: er.EasyRef, image: Image.Image | torch.Tensor, found: str, wanted: str
) -> None:
    assert_refused(lambda: model.encode([color(), image]), "reference 2", found, wanted)


def test_one_value_that_is_not_a_number_is_found() -> None:
    pixels = golden.as_tensor(color())
    pixels[50, 50, 1] = torch.nan
    assert_refused(lambda: to_rgb(pixels), "reference holds 1 values that are NaN")


@pytest.mark.parametrize("size", [(14, 14), (14, 2800), (2800, 14), (3000, 20)])
def test_the_smallest_and_longest_images_are_accepted(model: er.EasyRef, size: tuple[int, int]) -> None:
    context = model.encode([Image.new("RGB", size)], size=golden.SIZE)
    assert torch.isfinite(context.states).all()


def test_truncated_image_file(model: er.EasyRef) -> None:
    color().save(data := io.BytesIO(), "BMP")
    cut = Image.open(io.BytesIO(data.getvalue()[:-500]))
    parts = "reference 1", "cannot be read", "truncated", "is damaged"
    assert_refused(lambda: model.encode([cut]), *parts)


NOT_A_LIST = "images is a … wanted a list of PIL images"
NO_IMAGE = "reference 1 is a … wanted a PIL image"
NOT_GROUPS = [
    *((thing, NOT_A_LIST) for thing in (3, None, True, "0.png", b"", {"a": 1}, (image for image in ()))),
    (Image.new("RGB", (20, 20)), "images is one image; wanted a list of them"),
    ([np.zeros((28, 28, 3))], NO_IMAGE),
    (np.zeros((3, 28, 28, 3), np.float32), NO_IMAGE),
]


@pytest.mark.parametrize(("images", "text"), NOT_GROUPS)
def test_group_that_is_not_a_list_of_images(model: er.EasyRef, images: object, text: str) -> None:
    assert_refused(lambda: model.encode(images), text, kind=TypeError)


def test_batch_is_a_group_of_its_images(model: er.EasyRef) -> None:
    batch = torch.rand(3, 20, 20, 3)
    for group in (batch, tuple(batch)):
        assert model.encode(group, size=golden.SIZE).provenance.references == 3
    assert_refused(lambda: model.encode(batch[:0]), "The group holds no reference")
    assert_refused(lambda: model.encode(batch[0]), "reference 1 has shape (20, 3)", FORM)


# Length


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> er.EasyRef:
    """The golden model with room for a context of 192 tokens, reference tokens included."""
    folder = tmp_path_factory.mktemp("short") / "mllm"
    return er.load(golden.CHECKPOINT, folder_with(folder, max_position_embeddings=192))


def many(count: int) -> list[Image.Image]:
    """References of different sizes and so numbers of tokens."""
    return (golden.references() * count)[:count]


def fitting(model: er.EasyRef, prompt: str) -> int:
    """Number of references that fit, according to the error for too many."""
    text = error_of(lambda: model.encode(many(40), prompt, size=golden.SIZE))
    assert_says(text, "The group is too long for the MLLM: 40 references and the text make", "184 fit beside")
    return int(
        re.search(r"first (\d+) references fit; remove the others or encode at a smaller size", text)[1]
    )


@pytest.mark.parametrize("prompt", ["", golden.PROMPT, golden.PROMPT * 2])
def test_the_references_said_to_fit_do_fit_and_one_more_does_not(short: er.EasyRef, prompt: str) -> None:
    count = fitting(short, prompt)
    context = short.encode(many(count), prompt, size=golden.SIZE)
    assert context.states.shape[1] <= 192 - short.config.num_tokens
    assert "too long" in error_of(lambda: short.encode(many(count + 1), prompt, size=golden.SIZE))


def test_a_context_filled_to_the_last_token_is_accepted(short: er.EasyRef) -> None:
    length = short.encode(many(2), "", size=golden.SIZE).states.shape[1]
    prompt = "!" * (184 - length)  # one token each
    assert short.encode(many(2), prompt, size=golden.SIZE).states.shape[1] == 184
    assert fitting(short, prompt) == 2


def test_a_prompt_of_100000_characters(model: er.EasyRef) -> None:
    found = "The group is too long for the MLLM: 1 references and the text make"
    prompt = "a cat " * 16_667
    assert_refused(
        lambda: model.encode(many(1), prompt, size=golden.SIZE), found, "4,088 fit", "Shorten the prompt"
    )


def test_long_group_is_refused_before_it_is_resized(
    model: er.EasyRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.group_encoder.caches, "prepare", lambda *_: pytest.fail("resized"))
    assert_refused(lambda: model.encode([color()] * 1000), "too long for the MLLM", "1000 references")


# Context and tokens of another checkpoint


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> er.EasyRef:
    """A checkpoint of the same sizes and other weights."""
    tensors = checkpoint_tensors()
    tensors["mllm_final_layer.reference_tokens"] += 0.1
    path = write(tmp_path_factory.mktemp("other") / "other.safetensors", tensors)
    return er.load(path, golden.MLLM)


def test_a_context_of_another_checkpoint(model: er.EasyRef, other: er.EasyRef) -> None:
    context = model.encode(many(1), size=golden.SIZE)
    assert_refused(
        lambda: other.aggregate(context),
        f"This context was made by another EasyRef checkpoint ({model.fingerprint}",
        f"this one is {other.fingerprint}, other.safetensors",
        "Encode the group with this checkpoint",
    )


@pytest.mark.parametrize("branch", ["tokens", "uncond"])
def test_tokens_of_another_checkpoint(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    other: er.EasyRef,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
    branch: str,
) -> None:
    others = other.unconditional(size=golden.SIZE)
    pair = (tokens, others) if branch == "tokens" else (others, uncond)
    assert_refused(
        lambda: er.diffusers_unet.apply(unet, other, *pair),
        f"was made by another EasyRef checkpoint ({model.fingerprint}",
        "Encode the group with this checkpoint",
    )


def test_refused_tokens_leave_the_unet_as_it_was(
    unet: UNet2DConditionModel, other: er.EasyRef, tokens: er.ReferenceTokens
) -> None:
    before = unet.attn_processors
    error_of(lambda: er.diffusers_unet.apply(unet, other, tokens, None))
    assert all(processor is before[name] for name, processor in unet.attn_processors.items())


def test_tokens_that_are_not_finite(model: er.EasyRef) -> None:
    context = model.encode(many(1), size=golden.SIZE)
    broken = dataclasses.replace(context, states=context.states * torch.inf)
    parts = "not finite (computed in torch.float32)", "precision fp32"
    assert_refused(lambda: model.aggregate(broken), *parts)


# Special tokens in a text

SPECIAL = [f"<|{name}|>" for name in "image_pad vision_start vision_end im_end im_start endoftext".split()]


@pytest.mark.parametrize("typed", SPECIAL)
def test_special_tokens_in_a_text_are_text(model: er.EasyRef, typed: str) -> None:
    text, special = f"a cat {typed} on a mat", {model.tokenizer.token_to_id(token) for token in SPECIAL}
    plain, ids = (tokenize(model.tokenizer, words, [3, 2])[0].tolist() for words in ("a cat", text))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert f"<|vision_end|>{text}<|im_end|>" in model.tokenizer.decode(ids, skip_special_tokens=False)


def test_an_image_token_in_prompt_and_instruction_takes_no_image_feature(model: er.EasyRef) -> None:
    context = model.encode(many(1), "<|image_pad|>" * 5, "Look at <|image_pad|>: ", golden.SIZE)
    assert torch.isfinite(context.states).all()


@pytest.mark.parametrize("half", ["\ud83d", "\ud83d\ude00"])
def test_unpaired_surrogate(model: er.EasyRef, half: str) -> None:
    parts = "prompt contains an unpaired surrogate", "at position 3", "Remove it"
    assert_refused(lambda: model.encode(many(1), f"a {half}", "", golden.SIZE), *parts)


@pytest.mark.parametrize(("prompt", "instruction"), [(None, "x"), ("x", 3), (b"x", "x")])
def test_text_that_is_not_a_str(model: er.EasyRef, prompt: object, instruction: object) -> None:
    assert_refused(lambda: model.encode([color()], prompt, instruction), "wanted a text", kind=TypeError)


def test_tokenizer_without_image_tokens() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    parts = "The tokenizer has no token '<|im_start|>'", "Choose a Qwen2-VL folder"
    assert_refused(lambda: tokenize(tokenizer, "a", [1]), *parts)


# UNets that do not fit


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS: dict[str, tuple[list[str], list[int], int | tuple[int, ...], str]] = {
    # down blocks, their widths, transformer blocks in each
    "SD1.5": ([CROSS] * 3 + [PLAIN], [32, 64, 64, 64], 1, "16 cross-attentions (5 x 32 wide, 11 x 64 wide)"),
    "SDXL refiner": ([PLAIN, CROSS, CROSS, PLAIN], [32] * 4, 1, "11 cross-attentions (11 x 32 wide)"),
    "wider": ([PLAIN, CROSS, CROSS], [32, 64, 64], (1, 1, 2), "17 cross-attentions (17 x 64 wide)"),
}


@pytest.mark.parametrize(("down", "widths", "depths", "found"), UNETS.values(), ids=UNETS)
def test_a_unet_that_does_not_fit(
    model: er.EasyRef, tokens: er.ReferenceTokens, down: list, widths: list, depths: object, found: str
) -> None:
    unet = golden.empty_unet(down, widths, depths)
    assert_refused(
        lambda: er.diffusers_unet.apply(unet, model, tokens, None),
        f"The UNet does not fit the EasyRef checkpoint: it has {found}",
        "the checkpoint is made for 17 cross-attentions (17 x 32 wide)",
        "needs an SDXL base model",
    )


def test_a_model_without_cross_attentions(model: er.EasyRef, tokens: er.ReferenceTokens) -> None:
    found = "it has no cross-attentions of Stable Diffusion's kind"
    linear = torch.nn.Linear(1, 1)
    assert_refused(
        lambda: er.diffusers_unet.apply(linear, model, tokens, None),
        found,
        "not SD1.5, Flux or the SDXL refiner",
    )
