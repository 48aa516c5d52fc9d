"""Two processes (gloo, CPU): gradients of one with double the batch, and broken rows skipped together."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_worker(launcher: list[object], base: Path, *steps: object, **variables: str) -> None:
    """Run the worker's commands; steps: the name of each, its output folder and its argument."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    arguments = [sys.executable, *launcher, WORKER, base, *steps]
    done = subprocess.run(
        list(map(str, arguments)), env=environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folders of what two processes do one after the other."""
    steps = {"broken 1": ("broken", 1), "broken 2": ("broken", 2), "refused": ("broken", 2)}
    steps |= {"stopped": ("stop", 1), "gradients": ("gradients", 2)}  # the last one changes the precision
    folders = {name: tmp_path_factory.mktemp(command) for name, (command, _) in steps.items()}
    other = folders["refused"] / "run"
    (other / "state-1").mkdir(parents=True)
    (other / "settings.json").write_text('{"seed": 5}')
    words = [(command, folders[name], argument) for name, (command, argument) in steps.items()]
    run_worker(TWO, base_folder, *chain.from_iterable(words))
    return folders


def ends(folder: Path) -> tuple[str, str]:
    """Ends of the two processes, as each wrote it."""
    return (folder / "0.txt").read_text(), (folder / "1.txt").read_text()


@pytest.fixture(scope="module")
def gradients(two: dict[str, Path], base_folder: Path) -> dict[str, dict]:
    run_worker([], base_folder, "gradients", two["gradients"], 4)
    return {path.stem: torch.load(path) for path in two["gradients"].glob("gradients-*.pt")}


def test_both_processes_have_the_same_gradients(gradients: dict[str, dict]) -> None:
    first, second = gradients["gradients-0-of-2"], gradients["gradients-1-of-2"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_have_the_gradients_of_one_with_double_the_batch(gradients: dict[str, dict]) -> None:
    two, one = gradients["gradients-0-of-2"], gradients["gradients-0-of-1"]
    assert len(one) > 100
    for name, expected in one.items():
        assert (two[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("limit", [1, 2])
def test_broken_rows_of_one_process_stop_both_or_none(two: dict[str, Path], limit: int) -> None:
    folder = two[f"broken {limit}"]
    first, second = ends(folder)
    assert first == second
    assert (folder / "run" / "easyref.safetensors").is_file() == (limit == 2)
    if limit == 2:
        assert first == "finished"
        return
    assert first.startswith(
        "2 rows could not be used; data.max_broken allows 1:\n"
        "  line 2: x.png cannot be read\n  line 3: x.png cannot be read\nRepair the images or raise"
    )


def test_folder_of_another_run_is_refused_by_both(two: dict[str, Path]) -> None:
    first, second = ends(two["refused"])
    assert first == second
    assert "contains a run with other settings" in first


def test_signal_to_one_process_stops_both_after_the_same_update(two: dict[str, Path]) -> None:
    first, second = ends(two["stopped"])
    assert first == second
    assert first.startswith("A signal stopped alignment after update 2 of 4")
    assert [path.name for path in (two["stopped"] / "run").glob("state-*")] == ["state-2"]
