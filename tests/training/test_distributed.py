"""Two processes give the gradients of one with double the batch (gloo, CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def gradients(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("gradients")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for launcher, batch in (
        (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 2),
        ([], 4),
    ):
        command = [sys.executable, *launcher, WORKER, "gradients", base_folder, folder, batch]
        done = subprocess.run(
            list(map(str, command)), env=environment, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
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
