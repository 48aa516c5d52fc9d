"""Paths, line ends and locales: nothing depends on ASCII, on "\\n" or on the system's encoding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import easyref_core as er
from devkit import golden
from devkit.hosts import ROOT
from easyref_core.mllm.instructions import tokenize
from easyref_core.mllm.tokenizer import load_tokenizer

NAMES = {
    "spaces": "my models (old) & new",
    "umlauts": "Größe äöü ß",
    "CJK": "猫の写真 고양이",
    "emoji": "😀 images 🐈‍⬛",
    "dots, quotes and signs": "v1.0 'it's' 100% #1 [a] {b}",
    "200 characters": "x" * 200,
}


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of this name."""
    folder = tmp_path / NAMES[request.param]
    folder.mkdir()
    return folder


def test_checkpoints_and_their_mllm_are_read_from_any_path(folder: Path, model: er.EasyRef) -> None:
    checkpoint = Path(shutil.copy(golden.CHECKPOINT, folder / f"{folder.name}.safetensors"))
    loaded = er.load(checkpoint, shutil.copytree(golden.MLLM, folder / folder.name))
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(*(tokenize(one.tokenizer, golden.PROMPT, [4]) for one in (loaded, model)))
    path = golden.write_deepspeed(folder / f"{folder.name}.pt", golden.checkpoint_tensors())
    assert er.load(path, golden.MLLM).fingerprint == model.fingerprint


def test_tokens_are_saved_to_any_path(folder: Path, tokens, uncond) -> None:
    # the longest name that systems allow, too
    for path in (folder / f"{folder.name}.safetensors", folder / f"{'x' * (255 - 12)}.safetensors"):
        er.save_tokens(path, tokens, uncond)
        assert torch.equal(er.load_tokens(path).conditional, tokens)
        assert list(folder.iterdir()) == [path]
        path.unlink()


# Line ends


def test_windows_line_ends_in_an_mllm_folder_change_nothing(tmp_path: Path, model: er.EasyRef) -> None:
    """git on Windows may write them: config.json, tokenizer_config.json, merges.txt, vocab.json."""
    mllm = shutil.copytree(golden.MLLM, tmp_path / "mllm")
    (mllm / "tokenizer.json").unlink()  # so that merges.txt is read
    for file in (*mllm.glob("*.json"), mllm / "merges.txt"):
        file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert b"\r\n" in (mllm / "merges.txt").read_bytes()
    assert er.load(golden.CHECKPOINT, mllm).config == model.config
    text = f"{golden.PROMPT}\nGröße 猫 😀"
    assert torch.equal(tokenize(load_tokenizer(mllm), text, [4]), tokenize(model.tokenizer, text, [4]))


# Locale

IN_C = f"""
import locale, sys
import torch
assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"), locale.getpreferredencoding(False)
import easyref_core as er
from pathlib import Path
model = er.load({str(golden.CHECKPOINT)!r}, {str(golden.MLLM)!r})
prompt = "Gr\\u00f6\\u00dfe \\u732b \\U0001f600"
tokens = model.aggregate(model.encode([torch.rand(64, 64, 3)], prompt, size={golden.SIZE}))
er.save_tokens(Path(sys.argv[1]), tokens, tokens)
assert er.load_tokens(Path(sys.argv[1])).conditional.provenance.prompt == prompt
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the locale C of Windows is another")
def test_a_system_without_utf_8_reads_and_writes_the_same(tmp_path: Path) -> None:
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_C, str(tmp_path / "tokens.safetensors")]
    run = subprocess.run(command, env=env, capture_output=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    assert er.load_tokens(tmp_path / "tokens.safetensors").conditional.provenance.prompt == "Größe 猫 😀"
