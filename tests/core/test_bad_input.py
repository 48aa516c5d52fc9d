"""What does not fit gets one clear error: the thing, what was found, what was wanted and the remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

import easyref_core as er
from easyref_core.checkpoint import open_checkpoint
from easyref_core.instructions import tokenize
from easyref_core.preprocess import to_rgb

from . import golden
from .golden import checkpoint_tensors, write

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def error_of(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def says(text: str, *parts: str) -> bool:
    """Whether all parts are in a text, in this order."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        assert at >= 0, f"{part!r} is not in (the rest of) {text!r}"
    return True


# Files that are something else

OTHERS: dict[str, tuple[str, list[str]]] = {
    "IP-Adapter": ("an IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
    "IP-Adapter FaceID": (
        "an IP-Adapter",
        ["image_proj.proj.0.weight", "ip_adapter.0.to_q_lora.down.weight", "ip_adapter.1.to_k_ip.weight"],
    ),
    "kohya LoRA": (
        "a LoRA",
        [
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        ],
    ),
    "diffusers LoRA": (
        "a LoRA",
        ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"],
    ),
    "Flux LoRA": (
        "a LoRA",
        ["double_blocks.0.img_attn.proj.lora_A.weight", "double_blocks.0.img_attn.proj.lora_B.weight"],
    ),
    "SD1.5": (
        "a Stable Diffusion 1.x/2.x checkpoint",
        [
            "model.diffusion_model.input_blocks.0.0.weight",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
            "first_stage_model.decoder.conv_in.weight",
        ],
    ),
    "SDXL": (
        "an SDXL checkpoint",
        [
            "model.diffusion_model.input_blocks.0.0.weight",
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
            "conditioner.embedders.1.model.ln_final.weight",
        ],
    ),
    "Flux": ("a Flux model", ["double_blocks.0.img_attn.proj.weight", "single_blocks.0.linear1.weight"]),
    "Flux in a checkpoint": ("a Flux model", ["model.diffusion_model.double_blocks.0.img_attn.proj.weight"]),
    "diffusers UNet": (
        "a UNet",
        ["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"],
    ),
    "Qwen2-VL": (
        "a Qwen2-VL model without EasyRef's own layers",
        ["visual.patch_embed.proj.weight", "model.layers.0.mlp.up_proj.weight"],
    ),
    "half an EasyRef": (
        "an incomplete one",
        ["mllm_final_layer.norm.weight", "unet.x.processor.to_q_lora.down.weight"],
    ),
    "unknown": ("a file of 2 tensors such as encoder.weight, logit_scale", ["logit_scale", "encoder.weight"]),
    "nothing": ("a file of 0 tensors", []),
}


@pytest.mark.parametrize(("what", "names"), OTHERS.values(), ids=OTHERS)
def test_a_file_that_is_something_else(tmp_path: Path, what: str, names: list[str]) -> None:
    path = write(tmp_path / "easyref.safetensors", {name: torch.zeros(1) for name in names})
    assert says(
        error_of(lambda: open_checkpoint(path)),
        f"{path} is not an EasyRef checkpoint but {what}.",
        "Wanted: a file with the keys mllm_final_layer.*, image_proj_model.* and *.to_k_ip.weight",
        "https://huggingface.co/zongzhuofan/EasyRef",
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert says(
        error_of(lambda: open_checkpoint(tmp_path / "gone"), FileNotFoundError), "gone does not exist."
    )


# Damaged files


@pytest.mark.parametrize("kept", [0, 5, 30_000, 805_174], ids=["all", "length", "header", "body"])
def test_a_safetensors_file_cut_short(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(golden.CHECKPOINT.read_bytes()[:kept])
    assert says(
        error_of(lambda: open_checkpoint(path)),
        f"{path} is not a complete safetensors file",
        f"{kept:,} bytes on disk",
        "download it again",
    )


def test_a_web_page_saved_as_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<!DOCTYPE html><title>404</title>")
    assert says(error_of(lambda: open_checkpoint(path)), str(path), "of another format; download it again")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("end", [4, 16, 18, 100, 400_000, -10])
def test_a_pt_file_cut_short(tmp_path: Path, zipped: bool, end: int) -> None:
    path = tmp_path / "cut.pt"
    torch.save(checkpoint_tensors(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:end])
    assert says(
        error_of(lambda: open_checkpoint(path)),
        f"{path} is damaged",
        "was not opened",
        "Use the .safetensors",
    )


class Payload:
    """An object that runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


class TestPickleWithCode:
    """A pickle that would run code is refused, and its code does not run."""

    @pytest.fixture(params=[True, False], ids=["zip", "old"])
    def path(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        content = {"module": checkpoint_tensors(), "optimizer": Payload(tmp_path / "marker")}
        torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "evil.pt"

    def test_the_payload_is_live(self, path: Path) -> None:
        torch.load(path, weights_only=False)
        assert path.with_name("marker").exists()

    def test_it_is_not_run(self, path: Path) -> None:
        error_of(lambda: open_checkpoint(path))
        assert not path.with_name("marker").exists()

    def test_the_error_names_what_was_found(self, path: Path) -> None:
        assert says(
            error_of(lambda: open_checkpoint(path)),
            f"{path} is damaged or holds Python objects other than tensors, which could run code when loaded",
            "mkdir",
            "Use the .safetensors file",
        )

    def test_the_error_does_not_say_how_to_run_it(self, path: Path) -> None:
        assert "weights_only" not in error_of(lambda: open_checkpoint(path))


def test_a_pickle_that_is_no_dictionary(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert says(
        error_of(lambda: open_checkpoint(tmp_path / "tensor.pt")), "holds a Tensor", "wanted a dictionary"
    )


# Tensors that lack, disagree or have no place


def test_missing_keys_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    gone = sorted(
        name for name in tensors if ".layers.1." in name or name.endswith("attn2.processor.to_v_ip.weight")
    )
    path = write(tmp_path / "gaps.safetensors", {name: t for name, t in tensors.items() if name not in gone})
    text = error_of(lambda: open_checkpoint(path, golden.MLLM))
    named = re.search(r"first (.*)\. The file", text)[1].split(", ")
    assert says(text, f"{path} lacks {len(gone)} tensors of an EasyRef model", "download or export it again")
    assert len(named) == 10
    assert set(named) <= set(gone)


@pytest.mark.parametrize(
    "key", ["mllm_final_layer.layers.0.mlp.gate_proj.weight", "multimodal_llm.model.embed_tokens.weight"]
)
def test_a_missing_key_that_tells_a_size(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "gap.safetensors", {n: t for n, t in checkpoint_tensors().items() if n != key})
    assert says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"lacks 1 tensors of an EasyRef model, first {key}.",
    )


def test_a_tensor_of_another_size(tmp_path: Path) -> None:
    key = "multimodal_llm.model.layers.1.mlp.up_proj.weight"
    path = write(tmp_path / "wrong.safetensors", checkpoint_tensors() | {key: torch.zeros(128, 60)})
    assert says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"{path}: 1 tensors do not have the size the others ask for",
        f"{key}: found (128, 60), wanted (128, 64)",
    )


def test_a_tensor_of_another_architecture(tmp_path: Path) -> None:
    key = "multimodal_llm.model.layers.1.self_attn.q_norm.weight"
    path = write(tmp_path / "other.safetensors", checkpoint_tensors() | {key: torch.zeros(16)})
    assert says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"{path} holds 1 tensors",
        "has none",
        key,
        "use the release",
    )


# MLLM folders that do not belong


def folder_with(folder: Path, **changes: object) -> Path:
    """The golden MLLM folder with another config.json."""
    shutil.copytree(golden.MLLM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 3584}, "hidden_size: folder 3584, checkpoint 64"),
        ({"num_hidden_layers": 28}, "num_hidden_layers: folder 28, checkpoint 4"),
        ({"vocab_size": 152064}, "vocab_size: folder 152064, checkpoint 416"),
        ({"intermediate_size": 18944}, "intermediate_size: folder 18944, checkpoint 128"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: folder 4, checkpoint 2"),
    ],
)
def test_a_folder_of_another_size(tmp_path: Path, changes: dict[str, int], found: str) -> None:
    folder = folder_with(tmp_path / "mllm", **changes)
    assert says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        f"The MLLM folder does not belong to this checkpoint ({found})",
        "Choose the folder of the MLLM it was trained with",
    )


def test_a_folder_of_another_patch_size(tmp_path: Path) -> None:
    vision = json.loads((golden.MLLM / "config.json").read_text())["vision_config"]
    folder = folder_with(tmp_path / "mllm", vision_config=vision | {"spatial_patch_size": 16})
    assert says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        "patches of 1536 values, the checkpoint's vision tower reads 1176",
        "Choose the MLLM folder",
    )


def test_a_folder_of_another_kind_of_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mllm", model_type="qwen2_5_vl")
    assert says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        f"{folder / 'config.json'} describes a model of type 'qwen2_5_vl'; EasyRef needs 'qwen2_vl'",
        "Qwen/Qwen2-VL-2B-Instruct",
    )


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    text = error_of(lambda: open_checkpoint(golden.CHECKPOINT, tmp_path), FileNotFoundError)
    assert says(text, f"{tmp_path} has no config.json", "Put all files of Qwen2-VL there")


def test_a_folder_with_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    text = error_of(lambda: open_checkpoint(golden.CHECKPOINT, tmp_path))
    assert says(text, f"{tmp_path / 'config.json'} is damaged", "Download it again")


def test_a_base_folder_without_weights(tmp_path: Path) -> None:
    stage_1 = {name: t for name, t in checkpoint_tensors().items() if not name.startswith("multimodal_llm.")}
    folder = folder_with(tmp_path / "mllm")
    (folder / "model.safetensors").unlink()
    path = write(tmp_path / "stage_1.safetensors", stage_1)
    text = error_of(lambda: open_checkpoint(path, folder), FileNotFoundError)
    assert says(text, f"{folder} holds no weights", "Put the MLLM's weight files there")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    shutil.copy(golden.MLLM / "config.json", tmp_path)
    text = error_of(lambda: er.load(golden.CHECKPOINT, tmp_path))
    assert says(
        text, "okenizer", str(tmp_path), "The folder needs tokenizer.json, or vocab.json and merges.txt"
    )


def test_no_folder_and_no_tokenizer(tmp_path: Path, model: er.EasyRef) -> None:
    model.save(tmp_path / "saved.safetensors")
    text = error_of(lambda: er.load(tmp_path / "saved.safetensors"))
    assert says(text, "A tokenizer is needed", "Pass mllm", "or tokenizer")


def test_a_tiny_mllm_without_its_folder() -> None:
    text = error_of(lambda: er.load(golden.CHECKPOINT, tokenizer=golden.MLLM))
    assert says(text, "64 wide (vision tower 32)", "1536 and 1280", "Choose the MLLM folder")


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    tensors["multimodal_llm.model.embed_tokens.weight"] = torch.zeros(400, 64)
    path = write(tmp_path / "small.safetensors", tensors)
    text = error_of(lambda: er.load(path, folder_with(tmp_path / "mllm", vocab_size=400)))
    assert says(text, "its <|image_pad|> is token 408, the MLLM knows 400", "Choose the MLLM folder")


# References


def test_no_reference(model: er.EasyRef) -> None:
    text = error_of(lambda: model.encode([], golden.PROMPT))
    assert says(text, "The group holds no reference", "Give it at least one image")


def color() -> Image.Image:
    return golden.references()[0].convert("RGB")


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


CONVERTED: dict[str, tuple[Callable[[], Image.Image], Callable[[], Image.Image]]] = {
    "RGBA": (lambda: with_alpha(color(), "RGBA"), color),
    "grey": (lambda: color().convert("L"), lambda: color().convert("L").convert("RGB")),
    "grey with alpha": (lambda: with_alpha(color(), "LA"), lambda: color().convert("L").convert("RGB")),
    "palette": (lambda: color().quantize(16), lambda: color().quantize(16).convert("RGB")),
    "black and white": (lambda: color().convert("1"), lambda: color().convert("1").convert("RGB")),
    "16 bits": (lambda: sixteen_bits(color()), lambda: color().convert("L").convert("RGB")),
    "16 bits in 32": (
        lambda: Image.fromarray(np.asarray(sixteen_bits(color())).astype(np.int32)),
        lambda: color().convert("L").convert("RGB"),
    ),
}


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode with alpha, half of it transparent."""
    image = image.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(("given", "same"), CONVERTED.values(), ids=CONVERTED)
def test_pil_images_of_every_mode_are_converted(given: Callable, same: Callable) -> None:
    assert np.array_equal(to_rgb(given()), same())


@pytest.mark.parametrize(("channels", "same"), [(1, "L"), (3, "RGB"), (4, "RGB")])
def test_tensors_of_one_three_and_four_channels_are_converted(channels: int, same: str) -> None:
    rgba = golden.as_tensor(with_alpha(color(), "RGBA"))
    grey = golden.as_tensor(color().convert("L"))[..., None]
    given = grey if channels == 1 else rgba[..., :channels]
    assert np.array_equal(to_rgb(given), color().convert(same).convert("RGB"))


def test_values_beyond_0_and_1_are_clipped() -> None:
    beyond = torch.tensor([-0.5, 0.5, 1.5]).expand(20, 20, 3)
    assert to_rgb(beyond).getpixel((0, 0)) == (0, 128, 255)


PATCH = "smaller than one patch of the vision tower (14x14). Use a picture"
FORM = "wanted (height, width, channels) with 1, 3 or 4 channels. Pass the images of a batch one by one"
NO_PICTURE: dict[str, tuple[Image.Image | torch.Tensor, str, str]] = {
    "1x1": (Image.new("RGB", (1, 1)), "is 1x1 pixels", PATCH),
    "1x4000": (Image.new("RGB", (1, 4000)), "is 1x4000 pixels", PATCH),
    "1x4000 tensor": (torch.zeros(4000, 1, 3), "is 1x4000 pixels", PATCH),
    "13x60": (Image.new("RGB", (13, 60)), "is 13x60 pixels", PATCH),
    "no rows": (torch.zeros(0, 20, 3), "is 20x0 pixels", PATCH),
    "thin": (
        Image.new("RGB", (14, 2801)),
        "is 14x2801 pixels",
        "one side is more than 200 times the other. Crop it",
    ),
    "NaN": (
        torch.full((20, 20, 3), torch.nan),
        "holds 1200 values that are NaN or infinite",
        "Check the node",
    ),
    "inf": (
        torch.full((20, 20, 3), torch.inf),
        "holds 1200 values that are NaN or infinite",
        "Check the node",
    ),
    "batch": (torch.zeros(2, 20, 20, 3), "has shape (2, 20, 20, 3)", FORM),
    "no channels": (torch.zeros(20, 20), "has shape (20, 20)", FORM),
    "two channels": (torch.zeros(20, 20, 2), "has shape (20, 20, 2)", FORM),
    "bytes": (
        torch.zeros(20, 20, 3, dtype=torch.uint8),
        "holds torch.uint8 values",
        "floats in 0..1. Divide 0..255",
    ),
}


@pytest.mark.parametrize(("image", "found", "wanted"), NO_PICTURE.values(), ids=NO_PICTURE)
def test_an_image_that_holds_no_picture(
    model: er.EasyRef, image: Image.Image | torch.Tensor, found: str, wanted: str
) -> None:
    assert says(error_of(lambda: model.encode([color(), image])), f"reference 2 {found}", wanted)


def test_one_value_that_is_not_a_number_is_found() -> None:
    pixels = golden.as_tensor(color())
    pixels[50, 50, 1] = torch.nan
    assert says(error_of(lambda: to_rgb(pixels)), "reference holds 1 values that are NaN")


@pytest.mark.parametrize("size", [(14, 14), (14, 2800), (2800, 14), (3000, 20)])
def test_the_smallest_and_longest_pictures_are_accepted(model: er.EasyRef, size: tuple[int, int]) -> None:
    context = model.encode([Image.new("RGB", size)], size=golden.SIZE)
    assert torch.isfinite(context.states).all()


# Length


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> er.EasyRef:
    """The golden model with room for a context of 192 tokens, reference tokens included."""
    folder = tmp_path_factory.mktemp("short") / "mllm"
    return er.load(golden.CHECKPOINT, folder_with(folder, max_position_embeddings=192))


def many(count: int) -> list[Image.Image]:
    """References of different sizes, so of different numbers of tokens."""
    return (golden.references() * count)[:count]


def fitting(model: er.EasyRef, prompt: str) -> int:
    """How many references fit, as the error for too many says."""
    text = error_of(lambda: model.encode(many(40), prompt, size=golden.SIZE))
    assert says(text, "The group is too long for the MLLM: 40 references and the text make", "184 fit beside")
    return int(
        re.search(r"The first (\d+) references fit; remove the others or encode at a smaller size", text)[1]
    )


@pytest.mark.parametrize("prompt", ["", golden.PROMPT, golden.PROMPT * 2])
def test_the_references_said_to_fit_do_fit(short: er.EasyRef, prompt: str) -> None:
    context = short.encode(many(fitting(short, prompt)), prompt, size=golden.SIZE)
    assert context.states.shape[1] <= 192 - short.config.num_tokens


@pytest.mark.parametrize("prompt", ["", golden.PROMPT, golden.PROMPT * 2])
def test_one_more_reference_does_not_fit(short: er.EasyRef, prompt: str) -> None:
    one_more = many(fitting(short, prompt) + 1)
    assert "too long" in error_of(lambda: short.encode(one_more, prompt, size=golden.SIZE))


def filling(model: er.EasyRef) -> str:
    """The prompt with which two references fill the context to the last token."""
    length = model.encode(many(2), "", size=golden.SIZE).states.shape[1]
    return "!" * (184 - length)  # one token each


def test_a_context_filled_to_the_last_token_is_accepted(short: er.EasyRef) -> None:
    assert short.encode(many(2), filling(short), size=golden.SIZE).states.shape[1] == 184


def test_references_that_fill_the_context_to_the_last_token_are_said_to_fit(short: er.EasyRef) -> None:
    assert fitting(short, filling(short)) == 2


def test_a_prompt_of_100000_characters(model: er.EasyRef) -> None:
    text = error_of(lambda: model.encode(many(1), "a cat " * 16_667, size=golden.SIZE))
    assert says(
        text,
        "The group is too long for the MLLM: 1 references and the text make",
        "4,088 fit",
        "Shorten the prompt",
    )


# Made by another checkpoint


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> er.EasyRef:
    """A checkpoint of the same sizes and other weights."""
    tensors = checkpoint_tensors()
    tensors["mllm_final_layer.reference_tokens"] += 0.1
    path = write(tmp_path_factory.mktemp("other") / "other.safetensors", tensors)
    return er.load(path, golden.MLLM)


def test_a_context_of_another_checkpoint(model: er.EasyRef, other: er.EasyRef) -> None:
    context = model.encode(many(1), size=golden.SIZE)
    assert says(
        error_of(lambda: other.aggregate(context)),
        f"This context was made by another EasyRef checkpoint ({model.fingerprint}",
        f"this one is {other.fingerprint}, other.safetensors",
        "Encode the group with this checkpoint",
    )


@pytest.mark.parametrize("side", ["tokens", "uncond"])
def test_tokens_of_another_checkpoint(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    other: er.EasyRef,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
    side: str,
) -> None:
    own = other.unconditional(size=golden.SIZE)
    given = (tokens, own) if side == "tokens" else (own, uncond)
    assert says(
        error_of(lambda: er.diffusers_unet.apply(unet, other, *given)),
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
    assert says(
        error_of(lambda: model.aggregate(broken)), "not finite (computed in torch.float32)", "precision fp32"
    )


# Special tokens in a text

SPECIAL = [
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
]


def special_ids(model: er.EasyRef) -> set[int]:
    return {model.tokenizer.token_to_id(token) for token in SPECIAL}


@pytest.mark.parametrize("typed", SPECIAL)
def test_special_tokens_in_a_text_are_text(model: er.EasyRef, typed: str) -> None:
    plain = tokenize(model.tokenizer, "a cat ", [3, 2])[0].tolist()
    ids = tokenize(model.tokenizer, f"a cat {typed}", [3, 2])[0].tolist()
    special = special_ids(model)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


@pytest.mark.parametrize("typed", SPECIAL)
def test_special_tokens_in_a_text_are_read_letter_by_letter(model: er.EasyRef, typed: str) -> None:
    text = f"a cat {typed} on a mat"
    ids = tokenize(model.tokenizer, text, [1])[0].tolist()
    assert f"<|vision_end|>{text}<|im_end|>" in model.tokenizer.decode(ids, skip_special_tokens=False)


def test_an_image_token_in_prompt_and_instruction_takes_no_image_feature(model: er.EasyRef) -> None:
    context = model.encode(many(1), "<|image_pad|>" * 5, "Look at <|image_pad|>: ", golden.SIZE)
    assert torch.isfinite(context.states).all()


def test_a_tokenizer_without_image_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    text = error_of(lambda: tokenize(Tokenizer(WordLevel({"a": 0}, unk_token="a")), "a", [1]))
    assert says(text, "The tokenizer has no token '<|im_start|>'", "Choose a Qwen2-VL folder")


# UNets that do not fit


def unet_of(blocks: Iterable[str], **sizes: object) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    down = tuple(blocks)
    up = tuple(block.replace("Down", "Up") for block in reversed(down))
    with torch.device("meta"):
        return UNet2DConditionModel(
            down_block_types=down, up_block_types=up, attention_head_dim=8, cross_attention_dim=32, **sizes
        )


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


@pytest.mark.parametrize(
    ("blocks", "sizes", "found"),
    [
        (
            [CROSS] * 3 + [PLAIN],
            {"block_out_channels": (32, 64, 64, 64)},
            "16 cross-attentions (5 x 32 wide, 11 x 64 wide)",
        ),
        (
            [PLAIN, CROSS, CROSS, PLAIN],
            {"block_out_channels": (32,) * 4},
            "11 cross-attentions (11 x 32 wide)",
        ),
        (
            [PLAIN, CROSS, CROSS],
            {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2)},
            "17 cross-attentions (17 x 64 wide)",
        ),
    ],
    ids=["SD1.5", "SDXL refiner", "wider"],
)
def test_a_unet_that_does_not_fit(
    model: er.EasyRef, tokens: er.ReferenceTokens, blocks: list[str], sizes: dict, found: str
) -> None:
    unet = unet_of(blocks, **sizes)
    assert says(
        error_of(lambda: er.diffusers_unet.apply(unet, model, tokens, None)),
        f"The UNet does not fit the EasyRef checkpoint: it has {found}",
        "the checkpoint is made for 17 cross-attentions (17 x 32 wide)",
        "needs an SDXL base model",
    )


def test_a_model_without_cross_attentions(model: er.EasyRef, tokens: er.ReferenceTokens) -> None:
    text = error_of(lambda: er.diffusers_unet.apply(torch.nn.Linear(1, 1), model, tokens, None))
    assert says(
        text, "it has no cross-attentions of Stable Diffusion's kind", "not SD1.5, Flux or the SDXL refiner"
    )
