"""Two processes (gloo, CPU): gradients of one with double the batch, and broken rows skipped together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_worker(launcher: list[object], command: str, *arguments: object, **variables: str) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    arguments = [sys.executable, *launcher, WORKER, command, *arguments]
    done = subprocess.run(
        list(map(str, arguments)), env=environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def gradients(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("gradients")
    for launcher, batch in ((TWO, 2), ([], 4)):
        run_worker(launcher, "gradients", base_folder, folder, batch)
    return {path.stem: torch.load(path) for path in folder.glob("gradients-*.pt")}


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
def test_broken_rows_of_one_process_stop_both_or_none(base_folder: Path, tmp_path: Path, limit: int) -> None:
    run_worker(TWO, "broken", base_folder, tmp_path, limit)
    first, second = ((tmp_path / f"{limit}-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert (tmp_path / f"{limit}" / "easyref.safetensors").is_file() == (limit == 2)
    if limit == 2:
        assert first == "finished"
        return
    assert first.startswith(
        "2 rows could not be used; data.max_broken allows 1:\n"
        "  line 2: x.png cannot be read\n  line 3: x.png cannot be read\nRepair the images or raise"
    )


def test_folder_of_another_run_is_refused_by_both(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "2" / "state-1").mkdir(parents=True)
    (tmp_path / "2" / "settings.json").write_text('{"seed": 5}')
    run_worker(TWO, "broken", base_folder, tmp_path, 2)
    first, second = ((tmp_path / f"2-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert "contains a run with other settings" in first


def test_signal_to_one_process_stops_both_after_the_same_update(base_folder: Path, tmp_path: Path) -> None:
    run_worker(TWO, "stop", base_folder, tmp_path, 1)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("A signal stopped alignment after update 2 of 4")
    assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-2"]
