"""A checkpoint cut short in place while its mapped weights are in use: refused before each use, not read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.checkpoint.checkpoint import open_checkpoint

MESSAGE = r"easyref.safetensors was made shorter .* bytes when it was opened, 1,000 now\)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copy(golden.CHECKPOINT, tmp_path / "easyref.safetensors"))


USES: dict[str, Callable[[er.EasyRef, er.ContextStates], object]] = {
    "encode": lambda model, _: model.encode([torch.rand(90, 90, 3)], size=84),
    "aggregate": lambda model, context: model.aggregate(context),
    "key_values": lambda model, context: model.key_values(torch.zeros(1, 2, model.config.token_width)),
    "lora": lambda model, _: model.checkpoint.lora(),
}


@pytest.fixture
def model(path: Path) -> er.EasyRef:
    return er.load(path, golden.MLLM)


def test_every_use_of_a_cut_file_is_refused(model: er.EasyRef, path: Path) -> None:
    context = model.encode([torch.rand(90, 90, 3)], size=84)
    model.checkpoint.lora()
    os.truncate(path, 1000)
    for use in USES.values():
        with pytest.raises(ValueError, match=MESSAGE):
            use(model, context)


@pytest.mark.parametrize("change", ["replaced", "deleted", "longer"])
def test_other_changes_leave_the_mapping_complete(model: er.EasyRef, path: Path, change: str) -> None:
    context = model.encode([torch.rand(90, 90, 3)], size=84)
    wanted = model.aggregate(context)
    if change == "replaced":
        (path.parent / "new").write_bytes(b"short")
        os.replace(path.parent / "new", path)
    elif change == "deleted":
        path.unlink()
    else:
        with path.open("ab") as file:
            file.write(b"more")
    assert torch.equal(model.aggregate(context), wanted)


def test_copied_weights_survive(path: Path) -> None:
    def state(mapped: bool) -> dict[str, torch.Tensor]:
        opened = open_checkpoint(path, golden.MLLM, mapped=mapped)
        tensors = opened.state(lambda _, tensor: tensor) | opened.lora()
        if not mapped:
            os.truncate(path, 1000)
            opened.require_not_cut()
            opened.lora()
        return tensors

    mapped = {name: tensor.clone() for name, tensor in state(mapped=True).items()}
    copied = state(mapped=False)
    assert mapped.keys() == copied.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in mapped.items())
