"""The shipped tokenizer is Qwen2-VL's, and loads without transformers and without files of the host."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from devkit import golden
from devkit.hosts import find_hosts, host_version
from devkit.prompts import SCRIPTS, prompts
from easyref_core.mllm.instructions import INSTRUCTION, chat, tokenize
from easyref_core.mllm.tokenizer import MERGES, load_tokenizer, special_tokens

PROMPTS = 10_000
MERGES_SHA256 = "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5"  # of Qwen2-VL's merges.txt
HOST_TOKENIZER = "comfy/text_encoders/qwen25_tokenizer"


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shipped: Tokenizer) -> Path:
    """The shipped tokenizer as the files of a Qwen2-VL folder, without tokenizer.json."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    shutil.copy(MERGES, folder / "merges.txt")
    (folder / "vocab.json").write_text(json.dumps(shipped.get_vocab(with_added_tokens=False)))
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": special_tokens()}
    config |= {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """transformers' Qwen2 tokenizer of that folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_merges_are_those_of_qwen2_vl() -> None:
    text = MERGES.read_text(encoding="utf-8")  # git may have written other line ends
    assert hashlib.sha256(text.encode()).hexdigest() == MERGES_SHA256


def test_special_tokens_have_the_ids_of_qwen2_vl(shipped: Tokenizer) -> None:
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    ids |= {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655}
    assert {token: shipped.token_to_id(token) for token in ids} == ids
    assert shipped.get_vocab_size() == 151657


def test_corpus_has_20_scripts_and_is_the_same_every_time() -> None:
    assert len(SCRIPTS) == 20
    assert prompts(100) == prompts(100) != prompts(100, seed=1)
    assert len(set(prompts(1000))) > 950  # few are as short as one English word


def test_prompts_are_encoded_as_by_transformers(shipped: Tokenizer, reference: Any) -> None:
    texts = prompts(PROMPTS)
    expected = reference(texts, split_special_tokens=True)["input_ids"]
    different = [text for text, a, b in zip(texts, ids_of(shipped, texts), expected, strict=True) if a != b]
    assert different == []
    assert len(expected) == PROMPTS


def test_a_chat_is_encoded_as_one_text_by_transformers(shipped: Tokenizer, reference: Any) -> None:
    """Each piece between two special tokens is encoded alone here, spaces and line breaks included."""
    for text in prompts(200, seed=1):
        if "<" not in text:  # typed special tokens are text here, and special in the authors' code
            whole = "".join(piece for piece, _ in chat(INSTRUCTION + text, [4, 9]))
            assert tokenize(shipped, INSTRUCTION + text, [4, 9]).tolist() == [reference(whole)["input_ids"]]


def test_files_of_a_folder_give_the_same_tokenizer(shipped: Tokenizer, folder: Path, tmp_path: Path) -> None:
    shipped.enable_truncation(3)
    shipped.enable_padding(length=9)
    shipped.save(str(tmp_path / "tokenizer.json"))
    shipped.no_truncation()
    shipped.no_padding()
    texts = prompts(100, seed=2)
    expected = ids_of(shipped, texts)
    assert [ids_of(load_tokenizer(one), texts) == expected for one in (folder, tmp_path)] == [True, True]


def test_newer_special_tokens_of_the_family_are_text(shipped: Tokenizer) -> None:
    """Qwen2.5's tokenizer, which ComfyUI has, adds <tool_call> and others; Qwen2-VL's has none of them."""
    assert len(shipped.encode("<tool_call>").ids) > 1


@pytest.mark.parametrize("host", find_hosts(), ids=host_version)
def test_tokenizer_of_the_host_has_the_same_vocabulary(shipped: Tokenizer, host: Path) -> None:
    files = host / HOST_TOKENIZER
    if not files.is_dir():
        pytest.skip(f"this ComfyUI has no {HOST_TOKENIZER}")
    vocabulary = json.loads((files / "vocab.json").read_text(encoding="utf-8"))
    assert shipped.get_vocab(with_added_tokens=False) == vocabulary


def test_without_the_package_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"The package tokenizers, .* pip install tokenizers"):
        load_tokenizer(golden.MLLM)


def test_special_tokens_of_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    mllm = shutil.copytree(folder, tmp_path / "mllm")
    config = json.loads((mllm / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {int(i) + 1: token for i, token in special_tokens().items()}
    (mllm / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="token 151644 in tokenizer_config.json, and 151643 after the tokens"
    ):
        load_tokenizer(mllm)
