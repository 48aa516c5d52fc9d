"""Two processes (gloo, CPU) by the launch files, with all weights or sharded: results of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands import launch
from safetensors.torch import load_file

from easyref_core.training.resume import saved_states
from easyref_core.training.run_log import read_metrics

from . import tiny
from .test_distributed import run_worker
from .test_launch import LAUNCH

UPDATES = [1, 2, 3]


@pytest.fixture(scope="module")
def one(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of one process with double the batch."""
    output = tmp_path_factory.mktemp("one")
    run_worker([], "launched", base_folder, output, 2)
    return output


@pytest.fixture(scope="module", params=["eight_gpus", "fsdp2"])
def two(request: pytest.FixtureRequest, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two processes that a launch file starts, in float32 instead of its bfloat16."""
    output = tmp_path_factory.mktemp(request.param)
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "29412"]
    file = LAUNCH / f"{request.param}.yaml"
    launcher = ["-m", launch.__name__, "--config_file", file, *options]
    run_worker(launcher, "launched", base_folder, output, 1)
    return output


def test_losses_and_norms_are_those_of_one_process(one: Path, two: Path) -> None:
    expected, actual = (read_metrics(folder / "metrics.csv") for folder in (one, two))
    assert [row["update"] for row in actual] == UPDATES
    for name in ("loss", "gradient_norm", "validation_loss"):
        assert [row[name] for row in actual] == pytest.approx([row[name] for row in expected], rel=1e-3), name


@pytest.mark.parametrize("name", ["easyref-1", "easyref"])
def test_checkpoints_are_those_of_one_process(one: Path, two: Path, name: str) -> None:
    start = load_file(tiny.GOLDEN_START["start"])
    expected, actual = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
    assert expected.keys() == actual.keys() == start.keys()
    moved = sum((expected[name] - start[name].float()).norm() for name in start)
    assert moved > 0.01
    assert sum((expected[name] - actual[name]).norm() for name in start) <= 1e-3 * moved


def test_sheets_and_states_are_written(two: Path) -> None:
    assert [int(path.stem) for path in sorted((two / "samples").glob("*.png"))] == UPDATES
    assert list(saved_states(two)) == [2, 3]
