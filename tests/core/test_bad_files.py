"""Files and folders that do not fit raise one clear error with thing, found, wanted and remedy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import easyref_core as er
from devkit import golden
from devkit.golden import Tensors, checkpoint_tensors, write
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.checkpoint.formats import quantized
from easyref_core.files.tensor_files import open_tensors

from .errors import assert_refused, assert_says, error_of, folder_with

RELEASE = "https://huggingface.co/zongzhuofan/EasyRef"
UP_PROJ = "multimodal_llm.model.layers.1.mlp.up_proj.weight"
EMBEDDING = "multimodal_llm.model.embed_tokens.weight"


def without_mllm() -> Tensors:
    """The golden checkpoint without the MLLM's tensors, which it then takes from the folder."""
    return {name: t for name, t in checkpoint_tensors().items() if not name.startswith("multimodal_llm.")}


@pytest.fixture
def stage_1(tmp_path: Path) -> Path:
    """A checkpoint that takes the MLLM's weights from a folder."""
    return write(tmp_path / "stage_1.safetensors", without_mllm())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden MLLM folder."""
    return folder_with(tmp_path / "mllm")


# Files that are something else

OTHERS = json.loads(Path(__file__).with_name("other_files.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_kind_of_file(tmp_path: Path, other: dict[str, Any]) -> None:
    path = write(tmp_path / "easyref.safetensors", {name: torch.zeros(1) for name in other["tensors"]})
    assert_refused(
        lambda: open_checkpoint(path),
        f"{path} is not an EasyRef checkpoint but {other['kind']}.",
        "Wanted: a file with the keys mllm_final_layer.*, image_proj_model.* and *.to_k_ip.weight",
        RELEASE,
    )


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(lambda: open_checkpoint(tmp_path / "gone"), "gone does not exist.", kind=FileNotFoundError)


# Damaged files


@pytest.mark.parametrize("size", [0, 5, 30_000, 805_174], ids=["all", "length", "header", "body"])
def test_truncated_safetensors(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(golden.CHECKPOINT.read_bytes()[:size])
    incomplete = f"{path} is not a complete safetensors file"
    assert_refused(lambda: open_checkpoint(path), incomplete, f"{size:,} bytes on disk", "download it again")


def pickled(content: object, zipped: bool = True) -> bytes:
    torch.save(content, data := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return data.getvalue()


ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])  # PyTorch's file formats


@ZIPPED
@pytest.mark.parametrize("end", [4, 16, 18, 100, 400_000, -10])
def test_truncated_pt_file(tmp_path: Path, zipped: bool, end: int) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(pickled(checkpoint_tensors(), zipped)[:end])
    assert_refused(
        lambda: open_checkpoint(path), f"{path} is damaged", "was not opened", "Use the .safetensors"
    )


GGUF = "is a GGUF file … wanted safetensors … Download the .safetensors file"
UNREADABLE: list[tuple[str, Callable[[], bytes], str]] = [
    (
        "page.safetensors",
        lambda: b"<!DOCTYPE html><title>404</title>",
        "of another format; download it again",
    ),
    ("easyref.gguf", lambda: b"GGUF" + bytes(100), GGUF),
    ("easyref.safetensors", lambda: b"GGUF" + bytes(100), GGUF),
    ("tensor.pt", lambda: pickled(torch.zeros(3)), "holds a Tensor … wanted a dictionary"),
    ("list.pt", lambda: pickled([torch.zeros(3)]), "holds a list … wanted a dictionary"),
    ("numbered.pt", lambda: pickled({1: torch.zeros(3)}), "but a file of 0 tensors"),
    (
        "not_text.pt",
        lambda: pickled(checkpoint_tensors()).replace(b"little", b"\xb7" * 6),
        "is damaged … Use the .safetensors",
    ),
]


@pytest.mark.parametrize(("name", "data", "text"), UNREADABLE, ids=[name for name, *_ in UNREADABLE])
def test_file_that_cannot_be_read(tmp_path: Path, name: str, data: Callable[[], bytes], text: str) -> None:
    (tmp_path / name).write_bytes(data())
    assert_refused(lambda: open_checkpoint(tmp_path / name), name, text)


class Payload:
    """An object that calls something when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


MARK = "{marker}"  # replaced by a path
PAYLOADS = [
    (os.mkdir, MARK),
    (os.system, f"touch {MARK}"),
    (eval, f"open('{MARK}', 'w')"),
    (exec, f"open('{MARK}', 'w')"),
    (getattr, "a", "upper"),
    (torch.load, MARK),
    (torch.hub.load, "a/b", "c"),
    (Path, "a"),
    (pickle.loads, b"cos\nmkdir\n."),
]


@ZIPPED
@pytest.mark.parametrize(("function", "arguments"), [(function, rest) for function, *rest in PAYLOADS])
def test_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, zipped: bool, function: Callable, arguments: list
) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    arguments = [text.replace(MARK, str(marker)) if isinstance(text, str) else text for text in arguments]
    path.write_bytes(pickled({"module": checkpoint_tensors(), "x": Payload(function, *arguments)}, zipped))
    text = error_of(lambda: open_checkpoint(path))
    assert not marker.exists()
    found = "is damaged or holds Python objects other than tensors, which could run code when loaded"
    assert_says(text, f"{path} {found}", function.__name__, "Use the .safetensors file")
    assert "weights_only" not in text  # the error must not explain how to run it
    if function in (os.mkdir, os.system, eval, exec):
        torch.load(path, weights_only=False)
        assert marker.exists()  # the payload works


# Odd files that can be read


def test_header_whose_length_starts_like_a_pickle(tmp_path: Path) -> None:
    """A safetensors file starts with the length of its header; 128 is also how pickles start."""
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(128)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert open_tensors(path).shapes == {"a": (1,)}


ODD = {3: torch.zeros(1), None: torch.zeros(1), (1, 2): torch.zeros(1), "sparse": torch.eye(2).to_sparse()}
ODD["meta"] = torch.zeros(2, device="meta")
QWEIGHT = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.qweight": torch.zeros(1)}
READABLE: dict[str, tuple[str, Callable[[Tensors], bytes]]] = {
    # since 2.13 torch.load decides by the suffix safetensors, and refuses it
    "zip named safetensors": ("a.safetensors", pickled),
    "old named safetensors": ("a.safetensors", lambda tensors: pickled(tensors, zipped=False)),
    "ordered": ("a.pt", lambda tensors: pickled(OrderedDict(tensors))),
    "a module in a module": ("a.pt", lambda tensors: pickled({"module": {"module": tensors}})),
    "odd names and tensors without values": ("a.pt", lambda tensors: pickled({"module": ODD | tensors})),
    "a quantized UNet beside": ("a.safetensors", lambda tensors: safetensors.torch.save(tensors | QWEIGHT)),
}


@pytest.mark.parametrize(("name", "data"), READABLE.values(), ids=READABLE)
def test_odd_file_that_can_be_read(tmp_path: Path, name: str, data: Callable[[Tensors], bytes]) -> None:
    (tmp_path / name).write_bytes(data(checkpoint_tensors()))
    assert open_checkpoint(tmp_path / name, golden.MLLM).sources


# Tensors that are missing, disagree or do not belong

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip"
FAR = "multimodal_llm.model.layers.{}.mlp.up_proj.weight"
FLAT = "1 tensors hold no weights … {key} … "
FOREIGN = "{path} holds 1 tensors in places where … has none … {key}"
USE_RELEASE = f"{FOREIGN} … use the release"
INTEGERS = "{path} … {key} holds torch.int8 values … Quantized files are not read"
LACKS = "lacks 1 tensors of an EasyRef model, first {key}."
SIZES = (
    "{path}: 1 tensors do not have the size that the others imply … {key}: found (128, 60), wanted (128, 64)"
)
CHANGED: list[tuple[str, torch.Tensor | None, str]] = [
    (UP_PROJ, torch.zeros(128, 64, dtype=torch.int8), INTEGERS),
    (UP_PROJ, torch.zeros(128, 60), SIZES),
    (EMBEDDING, torch.zeros(416), FLAT + "(416,)"),
    ("mllm_final_layer.norm.weight", torch.zeros(()), FLAT + "()"),
    (f"{TO_K}.weight", torch.zeros(0, 32), FLAT + "(0, 32)"),
    (FAR.format("9" * 12), torch.zeros(2, 2), FOREIGN),
    (FAR.format("9" * 5000), torch.zeros(2, 2), FOREIGN),
    ("multimodal_llm.model.layers.1.self_attn.q_norm.weight", torch.zeros(16), USE_RELEASE),
    ("mllm_final_layer.layers.0.mlp.gate_proj.weight", None, LACKS),
    (EMBEDDING, None, LACKS),
]


@pytest.mark.parametrize(("key", "tensor", "text"), CHANGED, ids=[key[-30:] for key, *_ in CHANGED])
def test_one_tensor_changed(tmp_path: Path, key: str, tensor: torch.Tensor | None, text: str) -> None:
    tensors = {name: t for name, t in (checkpoint_tensors() | {key: tensor}).items() if t is not None}
    path = write(tmp_path / "changed.safetensors", tensors)
    text = text.replace("{path}", str(path)).replace("{key}", key[:100])  # a long key is shortened
    assert_refused(lambda: er.load(path, golden.MLLM), text)


def test_missing_keys_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    gone = {n for n in tensors if ".layers.1." in n or n.endswith("attn2.processor.to_v_ip.weight")}
    path = write(tmp_path / "gaps.safetensors", {name: t for name, t in tensors.items() if name not in gone})
    text = error_of(lambda: open_checkpoint(path, golden.MLLM))
    named = re.search(r"first (.*)\. The file", text)[1].split(", ")
    assert_says(text, f"{path} lacks {len(gone)} tensors of an EasyRef model", "download or export it again")
    assert len(named) == 10
    assert set(named) <= gone


def test_keys_and_values_that_are_not_finite(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    key = next(name for name in tensors if name.endswith("to_v_ip.weight"))
    path = write(tmp_path / "nan.safetensors", tensors | {key: tensors[key] * torch.nan})
    model = er.load(path, golden.MLLM)
    with torch.inference_mode():
        tokens = model.unconditional(size=golden.SIZE)
        text = error_of(lambda: model.key_values(tokens))
    assert_says(text, "1 of the 34 keys and values are not finite", "Download the checkpoint again")


@pytest.mark.parametrize("metadata", ["v1", "[1]", '{"causal": "no"}'])
def test_damaged_metadata(tmp_path: Path, metadata: str) -> None:
    path = write(tmp_path / "file.safetensors", checkpoint_tensors(), {"easyref": metadata})
    parts = [path, metadata, "wanted a JSON object", "Save the checkpoint again"]
    assert_refused(lambda: open_checkpoint(path, golden.MLLM), *parts)


# Indices of weights

LEADS = [
    *(
        None,
        3,
        ["a"],
        "",
        ".",
        "..",
        "../outside.safetensors",
        "{outside}",
        "./../mllm/../outside.safetensors",
    ),
    *(
        "/etc/passwd",
        "a\x00b",
        "\ud800",
        "C:x",
        "C:\\x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "x" * 5000,
    ),
]


@pytest.mark.parametrize("name", LEADS)
def test_index_that_leads_outside_its_folder(folder: Path, name: object) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    name = str(outside) if name == "{outside}" else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    found, wanted = "index.json names ", "wanted the names of files beside it"
    assert_refused(lambda: open_tensors(folder), found, wanted, "Download the whole folder again")


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", "[" * 100_000, '{"weight_map": 3}'])
def test_damaged_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    assert_refused(lambda: open_tensors(folder), "index.json", "ownload")


def test_index_whose_files_are_missing_or_hold_no_weights(folder: Path) -> None:
    (index := folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    parts = [folder, "lacks gone.safetensors", "Download the whole folder again"]
    assert_refused(lambda: open_tensors(folder), *parts, kind=FileNotFoundError)
    index.write_text('{"weight_map": {"a": "config.json"}}')
    assert_refused(lambda: open_tensors(folder), "config.json is not a complete safetensors file")


# MLLM folders that do not belong


def belongs(*parts: str) -> str:
    """Error of a folder of another MLLM."""
    found = f"The MLLM folder does not belong to this checkpoint ({parts[0]})"
    return " … ".join([found, *parts[1:], "Choose the folder of the MLLM it was trained with"])


QWEN2_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
}
VISION = json.loads((golden.MLLM / "config.json").read_text())["vision_config"]
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": "4"}, "heads is '4'; wanted a whole number from 1"),
    ({"num_attention_heads": 0}, "heads is 0; wanted a whole number from 1"),
    ({"num_attention_heads": 7}, "is 64 wide, which 7 attention heads do not divide"),
    ({"rope_theta": float("nan")}, "rope_theta is nan; wanted a positive number"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1; wanted a positive number"),
    ({"max_position_embeddings": 10**30}, f"max_positions is {10**30}; wanted"),
    ({"max_position_embeddings": 1}, "the context (1) is not longer"),
    ({"vision_config": [1]}, "vision_config is [1]; wanted a JSON object"),
    ({"hidden_size": 3584}, belongs("hidden_size: folder 3584, checkpoint 64")),
    ({"num_hidden_layers": 28}, belongs("num_hidden_layers: folder 28, checkpoint 4")),
    ({"vocab_size": 152064}, belongs("vocab_size: folder 152064, checkpoint 416")),
    ({"intermediate_size": 18944}, belongs("intermediate_size: folder 18944, checkpoint 128")),
    ({"num_key_value_heads": 4}, belongs("num_key_value_heads: folder 4, checkpoint 2")),
    # 28 heads do not divide the checkpoint's width either, but that is not what is wrong
    (QWEN2_VL_7B, belongs("hidden_size: folder 3584, checkpoint 64", ". It holds Qwen2-VL-7B.")),
    (
        {"vision_config": VISION | {"spatial_patch_size": 16}},
        "patches of 1536 values, but the checkpoint's vision tower takes 1176 … Choose the MLLM folder",
    ),
    (
        {"model_type": "qwen2_5_vl", "hidden_size": 3584},
        "config.json describes Qwen2.5-VL-7B, model type 'qwen2_5_vl'; EasyRef needs 'qwen2_vl' … "
        "Qwen/Qwen2-VL-2B-Instruct",
    ),
]


@pytest.mark.parametrize(("changes", "text"), CONFIGS, ids=[str(changes)[:40] for changes, _ in CONFIGS])
def test_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    folder = folder_with(tmp_path / "mllm", **changes)
    assert_refused(lambda: open_checkpoint(golden.CHECKPOINT, folder), text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"a":' * 100_000, " is damaged … Download"),
        ('{"model_type": ', " is damaged … Download it again"),
        ("[]", "holds a list … wanted a JSON object"),
    ],
    ids=["deep", "cut", "list"],
)
def test_damaged_config(folder: Path, content: str, text: str) -> None:
    (folder / "config.json").write_text(content)
    assert_refused(lambda: open_checkpoint(golden.CHECKPOINT, folder), folder / "config.json", text)


@pytest.mark.parametrize("tokenizer_class", ["Own", "OwnFast", None])
def test_code_in_an_mllm_folder_is_not_run(tmp_path: Path, tokenizer_class: str | None) -> None:
    folder = folder_with(tmp_path / "mllm", auto_map={"AutoConfig": "own.Own"})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    changes = {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    with contextlib.suppress(ValueError):
        er.load(golden.CHECKPOINT, folder)
    assert not (tmp_path / "ran").exists()


def test_folder_without_a_config(tmp_path: Path) -> None:
    parts = [f"{tmp_path} has no config.json", "Put all files of Qwen2-VL there"]
    assert_refused(lambda: open_checkpoint(golden.CHECKPOINT, tmp_path), *parts, kind=FileNotFoundError)


def test_base_folder_without_weights(stage_1: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    parts = [f"{folder} holds no weights", "Put the MLLM's weight files there"]
    assert_refused(lambda: open_checkpoint(stage_1, folder), *parts, kind=FileNotFoundError)


# Quantized models

UNQUANTIZED = [
    "wanted weights that are not quantized",
    "Download Qwen/Qwen2-VL-2B-Instruct (https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct)",
    "precision fp8_e4m3fn",
]


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes, load_in_4bit"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
        ({"bits": 8}, "unknown method"),
        ("int8", "'int8'"),
    ],
)
def test_quantized_mllm(tmp_path: Path, stage_1: Path, settings: object, method: str) -> None:
    folder = folder_with(tmp_path / "mllm", quantization_config=settings)
    found = f"{folder} holds Qwen2-VL quantized (quantization_config in config.json: {method})"
    assert_refused(lambda: open_checkpoint(stage_1, folder), found, *UNQUANTIZED)


def test_quantized_mllm_of_another_size(tmp_path: Path, stage_1: Path) -> None:
    nested = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    folder = folder_with(tmp_path / "mllm", **QWEN2_VL_7B, **nested)
    assert_refused(lambda: open_checkpoint(stage_1, folder), f"{folder} holds Qwen2-VL-7B quantized (", "awq")


@pytest.mark.parametrize("none", [None, {}])
def test_folder_that_is_not_quantized(tmp_path: Path, stage_1: Path, none: object) -> None:
    folder = folder_with(tmp_path / "mllm", quantization_config=none)
    (folder / "Qwen2-VL-2B-Q4_K_M.gguf").touch()  # ignored beside other weights
    assert open_checkpoint(stage_1, folder).sources


QUANTIZED = """
qweight qzeros scales g_idx SCB weight_scale weight_scale_inv input_scale scale_weight weight_packed
weight.absmax weight.nested_quant_map weight.quant_state.bitsandbytes__nf4
""".split()


@pytest.mark.parametrize("added", QUANTIZED)
def test_quantized_tensors_in_an_mllm_folder(stage_1: Path, folder: Path, added: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{added}"
    write(folder / "more.safetensors", {name: torch.zeros(1)})
    found = f"{folder} holds Qwen2-VL quantized (1 tensors such as {name})"
    assert_refused(lambda: open_checkpoint(stage_1, folder), found, *UNQUANTIZED)


@pytest.mark.parametrize("with_config", [True, False])
def test_folder_of_gguf_files_alone(stage_1: Path, folder: Path, with_config: bool) -> None:
    (folder / "model.safetensors").rename(folder / "Qwen2-VL-2B-Q4_K_M.gguf")
    if not with_config:
        (folder / "config.json").unlink()
    found = "quantized (a GGUF file, Qwen2-VL-2B-Q4_K_M.gguf)"
    assert_refused(lambda: open_checkpoint(stage_1, folder), folder, found, *UNQUANTIZED)


def test_quantized_folder_of_which_only_the_config_is_read(tmp_path: Path) -> None:
    """The checkpoint has the MLLM's weights; the folder gives its config.json and its tokenizer."""
    folder = folder_with(tmp_path / "mllm", quantization_config={"quant_method": "gptq"})
    assert open_checkpoint(golden.CHECKPOINT, folder).sources


@pytest.mark.parametrize("added", QUANTIZED)
@pytest.mark.parametrize(
    "module",
    ["multimodal_llm.model.layers.0.mlp.up_proj", "mllm_final_layer.layers.0.mlp.up_proj", TO_K],
)
def test_quantized_checkpoint(tmp_path: Path, module: str, added: str) -> None:
    tensors = checkpoint_tensors() | {f"{module}.{added}": torch.zeros(1)}
    tensors.pop(f"{module}.weight")
    path = write(tmp_path / "quantized.safetensors", tensors)
    assert_refused(
        lambda: open_checkpoint(path, golden.MLLM),
        f"{path} is a quantized EasyRef checkpoint (1 tensors such as {module}.{added})",
        f"Download the release, {RELEASE}",
        "precision fp8_e4m3fn",
    )


def test_released_layout_is_not_taken_for_quantized() -> None:
    released = json.loads(golden.LAYOUT.read_text())["keys"]
    assert released
    assert quantized([*released, *checkpoint_tensors()]) == []


# Tokenizers


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    shutil.copy(golden.MLLM / "config.json", tmp_path)
    needs = "The folder needs tokenizer.json, or vocab.json and merges.txt"
    assert_refused(lambda: er.load(golden.CHECKPOINT, tmp_path), "okenizer", tmp_path, needs)


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    parts = ["No Qwen2-VL tokenizer could be read from", folder, "tokenizer.json"]
    assert_refused(lambda: er.load(golden.CHECKPOINT, folder), *parts)


def test_shipped_tokenizer_of_another_model(tmp_path: Path, model: er.EasyRef) -> None:
    """Without a folder the tokenizer is that of the release, which the tiny golden MLLM is too small for."""
    model.save(path := tmp_path / "saved.safetensors")
    assert_refused(lambda: er.load(path), "its <|image_pad|> is token 151655, the MLLM has 416 tokens")


def test_tiny_mllm_without_its_folder() -> None:
    parts = ["64 wide (vision tower 32)", "1536 and 1280", "Choose the MLLM folder"]
    assert_refused(lambda: er.load(golden.CHECKPOINT, tokenizer=golden.MLLM), *parts)


def test_tokenizer_of_a_larger_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "small.safetensors", checkpoint_tensors() | {EMBEDDING: torch.zeros(400, 64)})
    folder = folder_with(tmp_path / "mllm", vocab_size=400)
    found = "its <|image_pad|> is token 408, the MLLM has 400 tokens"
    assert_refused(lambda: er.load(path, folder), found, "Choose the MLLM folder")
