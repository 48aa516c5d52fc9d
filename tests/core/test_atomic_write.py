"""Atomic writes: with a full disk, and with a process that is killed while it writes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import easyref_core as er
from devkit import golden
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.files.atomic_write import atomic_write_text
from easyref_core.files.tensor_files import SafetensorsFile
from easyref_core.mllm.context import Provenance


def save_tokens(path: Path, value: float = 1.0) -> None:
    provenance = Provenance("0" * 16, "instruction", "prompt", 1, 84)
    tokens = er.ReferenceTokens.of(torch.full((1, 64, 2048), value), provenance)
    er.save_tokens(path, tokens, tokens)


def save_checkpoint(path: Path) -> None:
    er.load(golden.CHECKPOINT, golden.MLLM).save(path)


@pytest.mark.parametrize("save", [save_tokens, save_checkpoint])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, save: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    save(path)
    before = path.read_bytes()

    def full(tensors: object, file: Path, *_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_text_is_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "cannot be written: \ud800")
    assert path.read_text() == "old"
    atomic_write_text(path, "new")
    assert [path.read_text(), len(list(tmp_path.iterdir()))] == ["new", 1]


def save_for_ever(path: Path, value: float, saved_once: Any) -> None:
    save_tokens(path, value)
    saved_once.set()
    while True:
        save_tokens(path, value)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_process_killed_while_it_saves(tmp_path: Path) -> None:
    path, fork = tmp_path / "tokens.safetensors", multiprocessing.get_context("fork")
    for kill in range(20):
        saved_once = fork.Event()  # a busy machine may not run the child for seconds
        child = fork.Process(target=save_for_ever, args=(path, kill, saved_once))
        child.start()
        saved_once.wait()
        time.sleep(0.003 * kill)
        child.kill()
        child.join()
        tokens = er.load_tokens(path)
        assert torch.equal(tokens.conditional, tokens.unconditional)
        assert tokens.conditional.max().item() == kill
    others = {file.name for file in tmp_path.iterdir()} - {path.name}
    # safetensors 0.8 first writes to a name of its own: .tmp and six letters
    assert all(name.startswith(".") and not name.endswith(".safetensors") for name in others)


def test_file_replaced_between_two_reads(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4)}, path)
    file = SafetensorsFile(path)
    safetensors.torch.save_file({"a": torch.ones(5)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(ValueError, match=r"was replaced .* Load it again"):
        list(file.read(["a"]))


def test_lora_is_read_once() -> None:
    checkpoint = open_checkpoint(golden.CHECKPOINT, golden.MLLM)
    lora, again = checkpoint.lora(), checkpoint.lora()
    assert lora is not again
    assert all(again[name] is tensor for name, tensor in lora.items())
