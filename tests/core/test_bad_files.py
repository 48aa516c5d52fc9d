"""Files and folders that do not fit get one clear error: the thing, what was found, what was wanted, the remedy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

import easyref_core as er
from devkit import golden
from devkit.golden import checkpoint_tensors, write
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.checkpoint.formats import quantized
from easyref_core.files.tensor_files import open_tensors

from .errors import assert_says, error_of, folder_with

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
    assert_says(
        error_of(lambda: open_checkpoint(path)),
        f"{path} is not an EasyRef checkpoint but {what}.",
        "Wanted: a file with the keys mllm_final_layer.*, image_proj_model.* and *.to_k_ip.weight",
        "https://huggingface.co/zongzhuofan/EasyRef",
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert_says(
        error_of(lambda: open_checkpoint(tmp_path / "gone"), FileNotFoundError), "gone does not exist."
    )


# Damaged files


@pytest.mark.parametrize("kept", [0, 5, 30_000, 805_174], ids=["all", "length", "header", "body"])
def test_a_safetensors_file_cut_short(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(golden.CHECKPOINT.read_bytes()[:kept])
    assert_says(
        error_of(lambda: open_checkpoint(path)),
        f"{path} is not a complete safetensors file",
        f"{kept:,} bytes on disk",
        "download it again",
    )


def test_a_web_page_saved_as_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<!DOCTYPE html><title>404</title>")
    assert_says(error_of(lambda: open_checkpoint(path)), str(path), "of another format; download it again")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("end", [4, 16, 18, 100, 400_000, -10])
def test_a_pt_file_cut_short(tmp_path: Path, zipped: bool, end: int) -> None:
    path = tmp_path / "cut.pt"
    torch.save(checkpoint_tensors(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:end])
    assert_says(
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
        assert_says(
            error_of(lambda: open_checkpoint(path)),
            f"{path} is damaged or holds Python objects other than tensors, which could run code when loaded",
            "mkdir",
            "Use the .safetensors file",
        )

    def test_the_error_does_not_say_how_to_run_it(self, path: Path) -> None:
        assert "weights_only" not in error_of(lambda: open_checkpoint(path))


def test_a_pickle_that_is_no_dictionary(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert_says(
        error_of(lambda: open_checkpoint(tmp_path / "tensor.pt")), "holds a Tensor", "wanted a dictionary"
    )


def test_a_header_as_long_as_a_pickle_s_first_byte(tmp_path: Path) -> None:
    """A safetensors file starts with the length of its header; 128 is also how pickles start."""
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(128)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert open_tensors(path).shapes == {"a": (1,)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_pytorch_file_that_is_called_safetensors(tmp_path: Path, zipped: bool) -> None:
    """Since 2.13 torch.load goes by that name, and refuses it."""
    path = tmp_path / "a.safetensors"
    torch.save(checkpoint_tensors(), path, _use_new_zipfile_serialization=zipped)
    assert open_checkpoint(path, golden.MLLM).sources


def test_names_that_are_no_texts_and_tensors_without_values(tmp_path: Path) -> None:
    odd = {3: torch.zeros(1), "sparse": torch.eye(2).to_sparse(), "meta": torch.zeros(2, device="meta")}
    torch.save({"module": {**odd, **checkpoint_tensors()}}, tmp_path / "odd.pt")
    assert open_checkpoint(tmp_path / "odd.pt", golden.MLLM).sources


def test_a_record_of_the_archive_that_is_no_text(tmp_path: Path) -> None:
    torch.save(checkpoint_tensors(), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes().replace(b"little", b"\xb7\xb7\xb7\xb7\xb7\xb7")
    (tmp_path / "a.pt").write_bytes(data)
    assert_says(
        error_of(lambda: open_checkpoint(tmp_path / "a.pt")), "a.pt is damaged", "Use the .safetensors"
    )


# Tensors that lack, disagree or have no place


def test_weights_that_are_no_floating_point_numbers(tmp_path: Path) -> None:
    key = "multimodal_llm.model.layers.1.mlp.up_proj.weight"
    tensors = checkpoint_tensors()
    path = write(tmp_path / "int8.safetensors", tensors | {key: tensors[key].to(torch.int8)})
    text = error_of(lambda: er.load(path, golden.MLLM))
    assert_says(text, str(path), f"{key} holds torch.int8 values", "Quantized files are not read")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("multimodal_llm.model.embed_tokens.weight", (416,)),
        ("mllm_final_layer.norm.weight", ()),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight", (0, 32)),
    ],
)
def test_a_tensor_without_sides(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "flat.safetensors", checkpoint_tensors() | {key: torch.zeros(shape)})
    assert_says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)), "1 tensors hold no weights", key, str(shape)
    )


@pytest.mark.parametrize("number", ["9" * 12, "9" * 5000])
def test_a_layer_of_an_absurd_number_takes_no_time(tmp_path: Path, number: str) -> None:
    key = f"multimodal_llm.model.layers.{number}.mlp.up_proj.weight"
    path = write(tmp_path / "far.safetensors", checkpoint_tensors() | {key: torch.zeros(2, 2)})
    assert_says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)), "holds 1 tensors in places where", key[:60]
    )


def test_missing_keys_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    gone = sorted(
        name for name in tensors if ".layers.1." in name or name.endswith("attn2.processor.to_v_ip.weight")
    )
    path = write(tmp_path / "gaps.safetensors", {name: t for name, t in tensors.items() if name not in gone})
    text = error_of(lambda: open_checkpoint(path, golden.MLLM))
    named = re.search(r"first (.*)\. The file", text)[1].split(", ")
    assert_says(text, f"{path} lacks {len(gone)} tensors of an EasyRef model", "download or export it again")
    assert len(named) == 10
    assert set(named) <= set(gone)


@pytest.mark.parametrize(
    "key", ["mllm_final_layer.layers.0.mlp.gate_proj.weight", "multimodal_llm.model.embed_tokens.weight"]
)
def test_a_missing_key_that_tells_a_size(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "gap.safetensors", {n: t for n, t in checkpoint_tensors().items() if n != key})
    assert_says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"lacks 1 tensors of an EasyRef model, first {key}.",
    )


def test_a_tensor_of_another_size(tmp_path: Path) -> None:
    key = "multimodal_llm.model.layers.1.mlp.up_proj.weight"
    path = write(tmp_path / "wrong.safetensors", checkpoint_tensors() | {key: torch.zeros(128, 60)})
    assert_says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"{path}: 1 tensors do not have the size that the others imply",
        f"{key}: found (128, 60), wanted (128, 64)",
    )


def test_a_tensor_of_another_architecture(tmp_path: Path) -> None:
    key = "multimodal_llm.model.layers.1.self_attn.q_norm.weight"
    path = write(tmp_path / "other.safetensors", checkpoint_tensors() | {key: torch.zeros(16)})
    assert_says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"{path} holds 1 tensors",
        "has none",
        key,
        "use the release",
    )


def test_keys_and_values_that_are_not_finite(tmp_path: Path) -> None:
    key = next(name for name in checkpoint_tensors() if name.endswith("to_v_ip.weight"))
    tensors = checkpoint_tensors()
    path = write(tmp_path / "nan.safetensors", tensors | {key: tensors[key] * torch.nan})
    model = er.load(path, golden.MLLM)
    with torch.inference_mode():
        text = error_of(lambda: model.key_values(model.unconditional(size=golden.SIZE)))
    assert_says(text, "1 of the 34 keys and values are not finite", "Download the checkpoint again")


# Indices of weights


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The golden MLLM folder, beside it a file that its index must not lead to."""
    folder = tmp_path / "mllm"
    shutil.copytree(golden.MLLM, folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    return folder


def indexed(folder: Path, text: str) -> str:
    (folder / "model.safetensors.index.json").write_text(text)
    return error_of(lambda: open_tensors(folder))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{outside}", ".", "..", "", 3, None, ["a"], "a\x00b", "C:x", "x" * 5000],
)
def test_an_index_that_leads_elsewhere(sharded: Path, name: object) -> None:
    if name == "{outside}":
        name = str(sharded.parent / "outside.safetensors")
    text = indexed(sharded, json.dumps({"weight_map": {"a": name}}))
    assert_says(
        text, "index.json names ", "wanted the names of files beside it", "Download the whole folder again"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", "[" * 100_000, '{"weight_map": 3}'])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    assert_says(indexed(sharded, content), "index.json", "ownload")


def test_an_index_whose_files_are_not_all_there(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    text = error_of(lambda: open_tensors(sharded), FileNotFoundError)
    assert_says(text, str(sharded), "lacks gone.safetensors", "Download the whole folder again")


# MLLM folders that do not belong


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_attention_heads": "4"}, "heads is '4'; wanted a whole number from 1"),
        ({"num_attention_heads": 0}, "heads is 0; wanted a whole number from 1"),
        ({"num_attention_heads": 7}, "is 64 wide, which 7 attention heads do not divide"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; wanted a positive number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; wanted a positive number"),
        ({"max_position_embeddings": 10**30}, "max_positions is 1000000000000000000000000000000; wanted"),
        ({"max_position_embeddings": 1}, "the context (1) is not longer"),
        ({"vision_config": [1]}, "vision_config is [1]; wanted a JSON object"),
    ],
)
def test_a_config_with_a_value_that_cannot_be(tmp_path: Path, changes: dict, found: str) -> None:
    folder = folder_with(tmp_path / "mllm", **changes)
    assert found in error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder))


def test_a_config_nested_without_end(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mllm")
    (folder / "config.json").write_text('{"a":' * 100_000)
    assert_says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)), "config.json is damaged", "Download"
    )


def test_code_in_an_mllm_folder_is_not_run(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mllm", auto_map={"AutoConfig": "own.Own"})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    changes = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    with contextlib.suppress(ValueError):
        er.load(golden.CHECKPOINT, folder)
    assert not (tmp_path / "ran").exists()


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
    assert_says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        f"The MLLM folder does not belong to this checkpoint ({found})",
        "Choose the folder of the MLLM it was trained with",
    )


QWEN2_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
}


def test_a_folder_of_the_7b_is_called_so(tmp_path: Path) -> None:
    """28 heads do not divide the checkpoint's width either, but that is not what is wrong."""
    folder = folder_with(tmp_path / "mllm", **QWEN2_VL_7B)
    assert_says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        "The MLLM folder does not belong to this checkpoint (hidden_size: folder 3584, checkpoint 64).",
        "It holds Qwen2-VL-7B.",
        "Choose the folder of the MLLM it was trained with",
    )


def test_a_folder_of_another_patch_size(tmp_path: Path) -> None:
    vision = json.loads((golden.MLLM / "config.json").read_text())["vision_config"]
    folder = folder_with(tmp_path / "mllm", vision_config=vision | {"spatial_patch_size": 16})
    assert_says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        "patches of 1536 values, but the checkpoint's vision tower takes 1176",
        "Choose the MLLM folder",
    )


def test_a_folder_of_another_kind_of_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mllm", model_type="qwen2_5_vl", hidden_size=3584)
    assert_says(
        error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder)),
        f"{folder / 'config.json'} describes Qwen2.5-VL-7B, model type 'qwen2_5_vl'; EasyRef needs 'qwen2_vl'",
        "Qwen/Qwen2-VL-2B-Instruct",
    )


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    text = error_of(lambda: open_checkpoint(golden.CHECKPOINT, tmp_path), FileNotFoundError)
    assert_says(text, f"{tmp_path} has no config.json", "Put all files of Qwen2-VL there")


def test_a_folder_with_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    text = error_of(lambda: open_checkpoint(golden.CHECKPOINT, tmp_path))
    assert_says(text, f"{tmp_path / 'config.json'} is damaged", "Download it again")


def test_a_base_folder_without_weights(tmp_path: Path) -> None:
    stage_1 = {name: t for name, t in checkpoint_tensors().items() if not name.startswith("multimodal_llm.")}
    folder = folder_with(tmp_path / "mllm")
    (folder / "model.safetensors").unlink()
    path = write(tmp_path / "stage_1.safetensors", stage_1)
    text = error_of(lambda: open_checkpoint(path, folder), FileNotFoundError)
    assert_says(text, f"{folder} holds no weights", "Put the MLLM's weight files there")


# Quantized models


@pytest.fixture
def stage_1(tmp_path: Path) -> Path:
    """A checkpoint that takes the MLLM's weights from a folder."""
    tensors = checkpoint_tensors()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("multimodal_llm.")}
    return write(tmp_path / "stage_1.safetensors", kept)


UNQUANTIZED = [
    "wanted weights that are not quantized",
    "Download Qwen/Qwen2-VL-2B-Instruct (https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct)",
    "precision fp8_e4m3fn",
]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config in config.json: gptq"),
        ({"quant_method": "awq"}, "quantization_config in config.json: awq"),
        ({"load_in_4bit": True}, "quantization_config in config.json: bitsandbytes, load_in_4bit"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "quantization_config in config.json: fp8"),
        ({"bits": 8}, "quantization_config in config.json: unknown method"),
        ("int8", "quantization_config in config.json: 'int8'"),
    ],
)
def test_a_quantized_mllm_is_called_so(tmp_path: Path, stage_1: Path, settings: object, found: str) -> None:
    folder = folder_with(tmp_path / "mllm", quantization_config=settings)
    text = error_of(lambda: open_checkpoint(stage_1, folder))
    assert_says(text, f"{folder} holds Qwen2-VL quantized ({found})", *UNQUANTIZED)


def test_a_quantized_mllm_of_another_size_is_called_so(tmp_path: Path, stage_1: Path) -> None:
    settings = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    folder = folder_with(tmp_path / "mllm", **QWEN2_VL_7B, **settings)
    text = error_of(lambda: open_checkpoint(stage_1, folder))
    assert_says(text, "holds Qwen2-VL-7B quantized (", "awq")


@pytest.mark.parametrize("none", [None, {}])
def test_a_config_that_names_no_quantization_is_none(tmp_path: Path, stage_1: Path, none: object) -> None:
    assert open_checkpoint(stage_1, folder_with(tmp_path / "mllm", quantization_config=none)).sources


QUANTIZED = [
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "SCB",
    "weight_scale",
    "weight_scale_inv",
    "input_scale",
    "scale_weight",
    "weight_packed",
    "weight.absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
]


@pytest.mark.parametrize("added", QUANTIZED)
def test_quantized_tensors_in_an_mllm_folder(tmp_path: Path, stage_1: Path, added: str) -> None:
    folder, name = folder_with(tmp_path / "mllm"), f"model.layers.0.mlp.up_proj.{added}"
    write(folder / "more.safetensors", {name: torch.zeros(1)})
    text = error_of(lambda: open_checkpoint(stage_1, folder))
    assert_says(text, f"{folder} holds Qwen2-VL quantized (1 tensors such as {name})", *UNQUANTIZED)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_of_gguf_files_alone(tmp_path: Path, stage_1: Path, with_config: bool) -> None:
    folder = folder_with(tmp_path / "mllm")
    (folder / "model.safetensors").rename(folder / "Qwen2-VL-2B-Q4_K_M.gguf")
    if not with_config:
        (folder / "config.json").unlink()
    text = error_of(lambda: open_checkpoint(stage_1, folder))
    assert_says(text, str(folder), "quantized (a GGUF file, Qwen2-VL-2B-Q4_K_M.gguf)", *UNQUANTIZED)


def test_a_gguf_file_beside_the_weights_is_not_asked(tmp_path: Path, stage_1: Path) -> None:
    folder = folder_with(tmp_path / "mllm")
    (folder / "Qwen2-VL-2B-Q4_K_M.gguf").touch()
    assert open_checkpoint(stage_1, folder).sources


def test_a_quantized_folder_that_gives_its_config_alone_is_taken(tmp_path: Path) -> None:
    """The checkpoint has the MLLM's weights; of the folder its config.json and its tokenizer are read."""
    folder = folder_with(tmp_path / "mllm", quantization_config={"quant_method": "gptq"})
    assert open_checkpoint(golden.CHECKPOINT, folder).sources


@pytest.mark.parametrize("added", QUANTIZED)
@pytest.mark.parametrize(
    "module",
    [
        "multimodal_llm.model.layers.0.mlp.up_proj",
        "mllm_final_layer.layers.0.mlp.up_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip",
    ],
)
def test_a_quantized_checkpoint_is_called_so(tmp_path: Path, module: str, added: str) -> None:
    tensors = checkpoint_tensors() | {f"{module}.{added}": torch.zeros(1)}
    tensors.pop(f"{module}.weight")
    path = write(tmp_path / "quantized.safetensors", tensors)
    assert_says(
        error_of(lambda: open_checkpoint(path, golden.MLLM)),
        f"{path} is a quantized EasyRef checkpoint (1 tensors such as {module}.{added})",
        "Download the release, https://huggingface.co/zongzhuofan/EasyRef",
        "precision fp8_e4m3fn",
    )


def test_a_quantized_unet_beside_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.qweight"
    path = write(tmp_path / "easyref.safetensors", checkpoint_tensors() | {name: torch.zeros(1)})
    assert open_checkpoint(path, golden.MLLM).sources


def test_no_name_of_the_released_layout_is_one_of_a_quantized_model() -> None:
    released = json.loads(golden.LAYOUT.read_text())["keys"]
    assert released
    assert quantized([*released, *checkpoint_tensors()]) == []


@pytest.mark.parametrize("name", ["easyref.gguf", "easyref.safetensors"])
def test_a_gguf_file_is_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    text = error_of(lambda: open_checkpoint(tmp_path / name))
    assert_says(text, f"{name} is a GGUF file", "wanted safetensors", "Download the .safetensors file")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    shutil.copy(golden.MLLM / "config.json", tmp_path)
    text = error_of(lambda: er.load(golden.CHECKPOINT, tmp_path))
    assert_says(
        text, "okenizer", str(tmp_path), "The folder needs tokenizer.json, or vocab.json and merges.txt"
    )


def test_no_folder_and_no_tokenizer(tmp_path: Path, model: er.EasyRef) -> None:
    model.save(tmp_path / "saved.safetensors")
    text = error_of(lambda: er.load(tmp_path / "saved.safetensors"))
    assert_says(text, "A tokenizer is needed", "Pass mllm", "or tokenizer")


def test_a_tiny_mllm_without_its_folder() -> None:
    text = error_of(lambda: er.load(golden.CHECKPOINT, tokenizer=golden.MLLM))
    assert_says(text, "64 wide (vision tower 32)", "1536 and 1280", "Choose the MLLM folder")


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    tensors["multimodal_llm.model.embed_tokens.weight"] = torch.zeros(400, 64)
    path = write(tmp_path / "small.safetensors", tensors)
    text = error_of(lambda: er.load(path, folder_with(tmp_path / "mllm", vocab_size=400)))
    assert_says(text, "its <|image_pad|> is token 408, the MLLM has 400 tokens", "Choose the MLLM folder")


@pytest.mark.parametrize("metadata", ["v1", "[1]", '{"causal": "no"}'])
def test_metadata_of_ours_that_is_none(tmp_path: Path, metadata: str) -> None:
    path = write(tmp_path / "file.safetensors", checkpoint_tensors(), {"easyref": metadata})
    text = error_of(lambda: open_checkpoint(path, golden.MLLM))
    assert_says(text, str(path), metadata, "wanted a JSON object", "Save the checkpoint again")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mllm")
    (folder / "config.json").write_text("[]")
    text = error_of(lambda: open_checkpoint(golden.CHECKPOINT, folder))
    assert_says(text, str(folder / "config.json"), "holds a list", "wanted a JSON object")


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mllm")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    text = error_of(lambda: er.load(golden.CHECKPOINT, folder))
    assert_says(text, "No Qwen2-VL tokenizer could be read from", str(folder), "tokenizer.json")
