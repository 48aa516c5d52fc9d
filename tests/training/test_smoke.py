"""The smoke run of the README: the shipped tiny model trains, and its checkpoint loads."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import easyref_core as er
from devkit.hosts import ROOT
from easyref_core.training import config
from easyref_core.training.__main__ import main
from easyref_core.training.run_log import read_metrics

FILE = "easyref_core/training/configs/smoke.yaml"


def test_command_of_the_readme_trains_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer updates; a trained model starts at a low loss."""
    monkeypatch.chdir(ROOT)
    assert f"python -m easyref_core.training {FILE}" in (ROOT / "README.md").read_text(encoding="utf-8")
    shorter = ["updates=2", "save_every=2", "log_every=1", "samples.every=2", "samples.count=1"]
    monkeypatch.setattr(sys, "argv", ["training", FILE, *shorter, "samples.steps=2", f"output={tmp_path}"])
    main()
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss < 0.2 for loss in losses)
    assert (tmp_path / "samples" / "0000002.png").is_file()
    [settings] = config.load(FILE)
    before, after = (
        er.load(path, settings.mllm) for path in (settings.start, tmp_path / "easyref.safetensors")
    )
    assert before.config == after.config
    weights = (model.modules.kv.state_dict() for model in (before, after))
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
