"""Files appear whole or not at all: with a full disk, and when the process is killed while it writes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from devkit.golden import GOLDEN
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.files.atomic_write import atomic_write_text
from easyref_core.files.tensor_files import SafetensorsFile
from easyref_core.mllm.context import Provenance
from easyref_core.tokens.files import load_tokens, save_tokens
from easyref_core.tokens.reference_tokens import ReferenceTokens


def tokens(value: float) -> ReferenceTokens:
    made = Provenance("0" * 16, "instruction", "prompt", 1, 84)
    return ReferenceTokens.of(torch.full((1, 64, 2048), value), made)


def test_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "tokens.safetensors"
    save_tokens(path, tokens(1), tokens(1))

    def full(tensors: object, file: Path, *_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_tokens(path, tokens(2), tokens(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load_tokens(path).conditional.max() == 1


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "cannot be written: \ud800")
    assert path.read_text() == "old"
    atomic_write_text(path, "new")
    assert [path.read_text(), len(list(tmp_path.iterdir()))] == ["new", 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(tmp_path: Path) -> None:
    path, seen = tmp_path / "tokens.safetensors", set()
    for kill in range(20):
        child = os.fork()
        if not child:
            try:
                while True:
                    save_tokens(path, tokens(kill), tokens(kill))
            finally:
                os._exit(1)
        time.sleep(0.01 + 0.003 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            found = load_tokens(path)
            assert torch.equal(found.conditional, found.unconditional)
            seen.add(found.conditional.max().item())
    assert len(seen) > 3, "too few saves to say anything"
    left = {file.name for file in tmp_path.iterdir()} - {path.name}
    # safetensors 0.8 writes to a name of its own before ours: .tmp and six letters
    assert all(name.startswith(".") and not name.endswith(".safetensors") for name in left)


def test_file_replaced_between_two_readings(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4)}, path)
    file = SafetensorsFile(path)
    safetensors.torch.save_file({"a": torch.ones(5)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(ValueError, match=r"was replaced .* Load it again"):
        list(file.read(["a"]))


def test_lora_is_read_once() -> None:
    checkpoint = open_checkpoint(GOLDEN / "easyref.safetensors", GOLDEN / "mllm")
    first, again = checkpoint.lora(), checkpoint.lora()
    assert first is not again
    assert all(again[name] is tensor for name, tensor in first.items())
