"""SIGTERM: the run saves its last update, ends without a checkpoint, and continues bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from devkit.hosts import ROOT
from easyref_core.training.__main__ import main
from easyref_core.training.batches import Batch, MicroBatches, loader
from easyref_core.training.loop import train
from easyref_core.training.resume import saved_states
from easyref_core.training.run_log import read_metrics
from easyref_core.training.signals import STOPPING, Stopped

from . import tiny
from .tiny import TinyExamples

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


class StoppedExamples(TinyExamples):
    """Examples that send a signal to their own process at one position."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__(tiny.config())
        self.at, self.number = at, number

    def batch(self, positions: Sequence[int]) -> Batch:
        if self.at in positions:
            os.kill(os.getpid(), self.number)
        return super().batch(positions)


@pytest.mark.parametrize("number", STOPPING)
def test_signal_saves_the_update_and_the_run_continues_bit_for_bit(
    base_folder: Path, tmp_path: Path, examples: TinyExamples, number: int
) -> None:
    handler = signal.getsignal(number)
    stopped, complete = (
        tiny.settings(base_folder, output=tmp_path / name, updates=3, save_every=3)
        for name in ("stopped", "complete")
    )
    with pytest.raises(Stopped, match="alignment after update 2 of 3, whose state is saved. Start again"):
        train(stopped, StoppedExamples(at=3, number=number))  # of the second update
    assert list(saved_states(stopped.output)) == [2]
    assert not stopped.result.exists()
    assert signal.getsignal(number) is handler
    train(stopped, examples)
    train(complete, examples)
    one, other = load_file(stopped.result), load_file(complete.result)
    assert all(torch.equal(one[name], other[name]) for name in other)
    losses = [[row["loss"] for row in read_metrics(s.output / "metrics.csv")] for s in (stopped, complete)]
    assert losses[0] == losses[1]


def test_further_signals_change_nothing(base_folder: Path, tmp_path: Path) -> None:
    class Signalled(StoppedExamples):
        def batch(self, positions: Sequence[int]) -> Batch:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(positions)

    settings = tiny.settings(base_folder, output=tmp_path, accumulation=3, updates=2)
    with pytest.raises(Stopped):
        train(settings, Signalled(at=0, number=signal.SIGTERM))
    assert list(saved_states(tmp_path)) == [1]


class PatientBatches(MicroBatches):
    """Micro-batches whose data loading process sends SIGTERM to itself first."""

    def __getitem__(self, step: int) -> Batch:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(step)


def test_data_loading_processes_go_on(examples: TinyExamples) -> None:
    assert len(list(loader(PatientBatches(examples, 2), range(2), workers=1))) == 2


FAILING_RUN = """
from easyref_core.training.batches import MicroBatches, loader

class Broken:
    def batch(self, positions):
        raise ValueError("broken")

batches = loader(MicroBatches(Broken(), 1), range(20), workers=2)
try:
    next(batches)
except ValueError as error:
    print(error)
"""


def test_a_run_that_fails_ends_beside_its_data_loading_processes() -> None:
    """They ignore SIGTERM, by which multiprocessing ends those that are left at exit, and then waits."""
    command = [sys.executable, "-W", "ignore", "-c", FAILING_RUN]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "broken" in ended.stdout


def test_command_ends_without_an_error_or_another_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("base", "mllm"):
        (tmp_path / name).mkdir()
    file, trained = tmp_path / "run.yaml", []
    file.write_text(
        f"base: {tmp_path}/base\nmllm: {tmp_path}/mllm\noutput: {tmp_path}/out\nupdates: 1\nbatch_size: 1\n"
        "learning_rate: 1.0\ndata: {procedural: {groups: false}}\n"
        "stages: [{stage: alignment}, {stage: single_reference}]\n"
    )

    def stop(settings: tiny.Settings, *_: object) -> None:
        trained.append(settings.stage)
        raise Stopped("A signal stopped it.")

    monkeypatch.setattr("easyref_core.training.loop.train", stop)
    monkeypatch.setattr(sys, "argv", ["training", str(file)])
    main()
    assert trained == ["alignment"]
    assert "A signal stopped it." in caplog.text
