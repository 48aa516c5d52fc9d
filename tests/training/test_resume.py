"""A killed run resumes bit for bit, also from the state before a damaged one; two runs in one folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from easyref_core.training.batches import Batch
from easyref_core.training.config import Data
from easyref_core.training.loop import train
from easyref_core.training.resume import (
    flatten,
    require_same_run,
    run_lock,
    samples_before,
    saved_states,
)
from easyref_core.training.run_log import read_metrics

from . import tiny
from .tiny import TinyExamples, Train

WORKER = Path(__file__).with_name("worker.py")
SAMPLES_PER_UPDATE = 4  # a batch of 2, twice


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "easyref.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def complete(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: TinyExamples) -> Path:
    """Output folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("complete")
    train(tiny.resumable(base_folder, output), examples)
    return output


@pytest.fixture(scope="module")
def resumed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: TinyExamples) -> Path:
    """Output folder of a run that was killed in its sixth update, after saving the fourth, and resumed."""
    output = tmp_path_factory.mktemp("resumed")
    last = 5 * SAMPLES_PER_UPDATE + 1  # in the first micro-batch
    command = [sys.executable, WORKER, base_folder, "die", output, last]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert list(saved_states(output)) == [2, 4]
    assert [row["update"] for row in read_metrics(output / "metrics.csv")] == [1, 2, 3, 4, 5]
    # left behind by a kill while saving
    (output / "state.partial").mkdir()
    (output / "state.partial" / "model.safetensors").write_bytes(b"half")
    train(tiny.resumable(base_folder, output), examples)
    return output


def test_weights_and_losses_are_the_same_bit_for_bit(complete: Path, resumed: Path) -> None:
    assert same_weights(complete, resumed)
    expected, actual = (
        [(row["update"], row["loss"], row["gradient_norm"]) for row in read_metrics(folder / "metrics.csv")]
        for folder in (complete, resumed)
    )
    assert [update for update, *_ in expected] == [1, 2, 3, 4, 5, 6]
    assert actual == expected


def test_only_the_newest_states_are_retained(complete: Path, resumed: Path) -> None:
    assert list(saved_states(complete)) == list(saved_states(resumed)) == [4, 6]


@pytest.mark.parametrize(
    ("file", "size"), [("model.safetensors", 1000), ("optimizer.bin", 1000), ("optimizer.bin", None)]
)
def test_damaged_newest_state_falls_back_to_the_one_before(
    base_folder: Path, complete: Path, examples: TinyExamples, tmp_path: Path, file: str, size: int | None
) -> None:
    output = tmp_path / "run"
    shutil.copytree(complete, output)
    (output / "easyref.safetensors").unlink()
    damaged = output / "state-6" / file
    content = damaged.read_bytes()
    damaged.unlink() if size is None else damaged.write_bytes(content[:size])
    train(tiny.resumable(base_folder, output), examples)
    assert same_weights(complete, output)
    assert list(saved_states(output)) == [4, 6]
    assert (output / "state-6" / file).stat().st_size == len(content)
    assert (output / "damaged-state-6").is_dir()


def test_run_whose_states_are_all_damaged_is_refused(
    base_folder: Path, complete: Path, examples: TinyExamples, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(complete, output)
    (output / "easyref.safetensors").unlink()
    for folder in saved_states(output).values():
        (folder / "model.safetensors").write_bytes(b"half")
    message = r"No saved state in .* can be read \(state-6: \w+: .*; state-4: .*\)\. Restore one, or delete"
    with pytest.raises(ValueError, match=message):
        train(tiny.resumable(base_folder, output), examples)
    assert list(saved_states(output)) == [4, 6]


def test_second_run_in_a_folder_is_refused(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyref_core.training.resume.LOCK_SECONDS", 0.1)
    message = f"^{tmp_path} is in use by another run, which holds .*set another output"
    with run_lock(tmp_path), pytest.raises(ValueError, match=message):
        train_tiny(output=tmp_path)
    assert not (tmp_path / "settings.json").exists()
    train_tiny(output=tmp_path)


def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(_: FileLock) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with run_lock(tmp_path):
        pass
    assert f"The file system of {tmp_path} has no locks" in caplog.text


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from easyref_core.training.resume import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=WORKER.parents[2], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with run_lock(tmp_path, 0):
        pass


def test_finished_stage_is_not_trained_again(base_folder: Path, resumed: Path) -> None:
    before = (resumed / "easyref.safetensors").stat().st_mtime_ns
    result = train(tiny.resumable(base_folder, resumed), tiny.DyingExamples(tiny.config(), last=-1))
    assert result.stat().st_mtime_ns == before


def test_other_settings_are_refused(train_tiny: Train, complete: Path) -> None:
    message = r"other settings .*learning_rate was 0.01 and is 1.0.*another output"
    with pytest.raises(ValueError, match=message):
        train_tiny(output=complete, updates=9, learning_rate=1.0)


@pytest.mark.parametrize("rows", [True, False])
def test_run_of_before_exif_was_applied_continues_only_without_it(
    base_folder: Path, tmp_path: Path, rows: bool
) -> None:
    data = {"rows": tmp_path / "rows.json", "root": tmp_path} if rows else {"procedural": {}}
    before, after = (
        tiny.settings(base_folder, output=tmp_path, data=Data(**data, apply_exif=apply_exif))
        for apply_exif in (False, True)
    )
    content = {name: value for name, value in flatten(before).items() if name != "data.apply_exif"}
    (tmp_path / "settings.json").write_text(json.dumps(content | {"processes": 1}))
    (tmp_path / "state-1").mkdir()
    if rows:
        with pytest.raises(ValueError, match=r"\(data.apply_exif was False and is True\)"):
            require_same_run(after, 1)
        require_same_run(before, 1)
    else:
        require_same_run(after, 1)


@pytest.mark.parametrize(
    "layout", [{"accumulation": 1, "batch_size": 4}, {"accumulation": 4, "batch_size": 1}]
)
def test_run_continues_in_another_layout_with_the_same_samples(
    base_folder: Path,
    complete: Path,
    examples: TinyExamples,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    layout: dict[str, int],
) -> None:
    """The same samples per update give the same weights but for rounding."""
    output = tmp_path / "run"
    shutil.copytree(complete, output)
    (output / "easyref.safetensors").unlink()
    shutil.rmtree(output / "state-6")
    settings = tiny.resumable(base_folder, output)
    train(dataclasses.replace(settings, **layout), examples)
    assert "The run continues in another layout: accumulation was 2 and is" in caplog.text
    one, other = (load_file(folder / "easyref.safetensors") for folder in (complete, output))
    start = load_file(train(dataclasses.replace(settings, output=tmp_path / "start", updates=1), examples))
    moved = {name: (one[name] - start[name]).norm() for name in one}
    assert max(moved.values()) > 0.01
    # Adam turns a gradient of pure rounding error into a full step, so weights are compared by norm
    assert sum((one[name] - other[name]).norm() for name in one) <= 0.05 * sum(moved.values())


def test_rows_go_on_where_they_were(base_folder: Path, examples: TinyExamples, tmp_path: Path) -> None:
    """After two updates of 3 samples, a batch of 2 continues at the seventh sample."""
    settings = tiny.settings(base_folder, output=tmp_path, updates=2, batch_size=3, save_every=2)
    train(settings, examples)
    positions: list[int] = []

    class Recorded(TinyExamples):
        def batch(self, sequence: range) -> Batch:
            positions.extend(sequence)
            return super().batch(sequence)

    train(dataclasses.replace(settings, updates=4, batch_size=2), Recorded(tiny.config()))
    assert positions == [6, 7, 8, 9]
    assert samples_before(settings, 4, 1) == 10


def test_state_without_progress_is_of_one_layout(base_folder: Path, tmp_path: Path) -> None:
    settings = tiny.settings(base_folder, output=tmp_path, accumulation=3, batch_size=2)
    assert samples_before(settings, 5, processes=4) == 5 * 3 * 2 * 4


def test_states_of_deepspeed_need_their_number_of_processes(base_folder: Path, tmp_path: Path) -> None:
    settings = tiny.settings(base_folder, output=tmp_path)
    require_same_run(settings, 2, "zero2")
    (tmp_path / "state-1").mkdir()
    with pytest.raises(ValueError, match=r"\(processes was 2 and is 4\)"):
        require_same_run(settings, 4, "zero2")
    with pytest.raises(ValueError, match=r"\(sharding was 'zero2' and is 'fsdp2'\)"):
        require_same_run(settings, 2, "fsdp2")
    require_same_run(settings, 2, "zero2")


def test_another_start_under_the_same_name_is_refused(train_tiny: Train, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    shutil.copy(tiny.GOLDEN_START["start"], start)
    run = tiny.GOLDEN_START | {"start": start, "output": tmp_path / "run"}
    result = train_tiny(**run)
    assert train_tiny(**run) == result
    shutil.copy(result, start)
    with pytest.raises(ValueError, match="other settings .*contents of start was"):
        train_tiny(**run)


def test_run_with_constant_rate_can_be_extended(train_tiny: Train, tmp_path: Path) -> None:
    for name, updates in (("two", 2), ("one", 1), ("one", 2)):
        train_tiny(output=tmp_path / name, updates=updates)
    assert same_weights(tmp_path / "two", tmp_path / "one")
