"""A run that was killed continues as if it never was."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from easyref_core.training.loop import train
from easyref_core.training.resume import saved_states
from easyref_core.training.run_log import read_metrics

from . import tiny

WORKER = Path(__file__).with_name("worker.py")
PER_UPDATE = 4  # samples: a batch of 2, twice


@pytest.fixture(scope="module")
def examples() -> tiny.TinyExamples:
    return tiny.TinyExamples(tiny.config())


@pytest.fixture(scope="module")
def whole(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: tiny.TinyExamples) -> Path:
    """The output folder of the run that nobody killed."""
    output = tmp_path_factory.mktemp("whole")
    train(tiny.resumable(base_folder, output), examples)
    return output


@pytest.fixture(scope="module")
def killed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run killed in the middle of its sixth update, the fourth saved last."""
    output = tmp_path_factory.mktemp("killed")
    last = 5 * PER_UPDATE + 1  # its first micro-batch
    command = [sys.executable, WORKER, "die", base_folder, output, last]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert list(saved_states(output)) == [2, 4]
    assert [row["update"] for row in read_metrics(output / "metrics.csv")] == [1, 2, 3, 4, 5]
    return output


@pytest.fixture(scope="module")
def continued(base_folder: Path, killed: Path, examples: tiny.TinyExamples) -> Path:
    # what a kill in the middle of saving leaves
    (killed / "state.partial").mkdir()
    (killed / "state.partial" / "model.safetensors").write_bytes(b"half")
    train(tiny.resumable(base_folder, killed), examples)
    return killed


def test_the_weights_are_the_same_bit_for_bit(whole: Path, continued: Path) -> None:
    wanted, found = (load_file(folder / "easyref.safetensors") for folder in (whole, continued))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_the_losses_are_the_same(whole: Path, continued: Path) -> None:
    wanted, found = (
        [(row["update"], row["loss"], row["gradient_norm"]) for row in read_metrics(folder / "metrics.csv")]
        for folder in (whole, continued)
    )
    assert [update for update, *_ in wanted] == [1, 2, 3, 4, 5, 6]
    assert found == wanted


def test_only_the_newest_states_stay(whole: Path, continued: Path) -> None:
    assert list(saved_states(whole)) == list(saved_states(continued)) == [4, 6]


def test_a_finished_stage_is_not_trained_again(base_folder: Path, continued: Path) -> None:
    before = (continued / "easyref.safetensors").stat().st_mtime_ns
    dying = tiny.DyingExamples(tiny.config(), last=-1)
    result = train(tiny.resumable(base_folder, continued), dying)
    assert result.stat().st_mtime_ns == before


def test_other_settings_do_not_continue_it(
    base_folder: Path, whole: Path, examples: tiny.TinyExamples
) -> None:
    changed = tiny.settings(base_folder, whole, updates=9, learning_rate=1.0)
    with pytest.raises(
        ValueError, match=r"other settings .*learning_rate was 0.01 and is 1.0.*another output"
    ):
        train(changed, examples)


def test_another_start_under_the_same_name_does_not_continue_it(
    base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples
) -> None:
    start = tmp_path / "start.safetensors"
    shutil.copy(tiny.GOLDEN_START["start"], start)
    run = tiny.settings(base_folder, tmp_path / "run", **tiny.GOLDEN_START | {"start": start}, updates=1)
    result = train(run, examples)
    assert train(run, examples) == result
    shutil.copy(result, start)
    with pytest.raises(ValueError, match="other settings .*contents of start was"):
        train(run, examples)


def test_a_run_of_constant_rate_can_be_made_longer(
    base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples
) -> None:
    train(tiny.settings(base_folder, tmp_path / "two", updates=2), examples)
    train(tiny.settings(base_folder, tmp_path / "one", updates=1), examples)
    train(tiny.settings(base_folder, tmp_path / "one", updates=2), examples)
    at_once, in_parts = (load_file(tmp_path / name / "easyref.safetensors") for name in ("two", "one"))
    assert all(torch.equal(at_once[name], in_parts[name]) for name in at_once)
