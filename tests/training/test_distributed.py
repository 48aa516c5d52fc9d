"""Two processes give the gradients of one with double the batch (gloo, CPU)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


def start(
    base: Path, output: Path, batch: int, rank: int = 0, world: int = 1, port: int = 0
) -> subprocess.Popen[str]:
    """Start one process with the environment variables of torchrun and accelerate launch."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        environment |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, WORKER, "gradients", base, output, str(batch)]
    return subprocess.Popen(
        list(map(str, command)), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def gradients(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("gradients")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = [
        start(base_folder, folder, 2, rank=0, world=2, port=port),
        start(base_folder, folder, 2, rank=1, world=2, port=port),
        start(base_folder, folder, 4),
    ]
    for job in jobs:
        output, _ = job.communicate(timeout=300)
        assert job.returncode == 0, output[-3000:]
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
