"""The smoke run of the README: the shipped tiny model trains, and its checkpoint loads."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import easyref_core as er
from devkit.documents import readme_commands
from devkit.hosts import ROOT
from easyref_core.training import config
from easyref_core.training.__main__ import main
from easyref_core.training.run_log import read_metrics

FILE = "easyref_core/training/configs/smoke.yaml"
README = ROOT / "easyref_core" / "training" / "README.md"


def test_command_of_the_readme_trains_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer updates, and with what the training README adds; a trained model starts at a low loss."""
    monkeypatch.chdir(ROOT)
    start = ["python", "-m", "easyref_core.training", FILE]
    assert start in readme_commands(ROOT / "README.md")
    [added] = [words[4:] for words in readme_commands(README) if words[:4] == start and words[4:]]
    shorter = ["updates=2", "save_every=2", "log_every=1", "samples.every=2", "samples.count=1"]
    shorter += ["samples.steps=2", "export_every=1", "validation.count=1", f"output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["training", FILE, *added, *shorter])
    main()
    assert (tmp_path / "easyref-1.safetensors").is_file()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert "validation_loss" in rows[-1]
    losses = [row["loss"] for row in rows]
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
