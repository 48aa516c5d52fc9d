"""Two processes (gloo, CPU) by the launch files, with all weights or sharded: results of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
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
def one(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function (worker's command) -> output folder of one process with double the batch."""

    @cache
    def run(command: str) -> Path:
        output = tmp_path_factory.mktemp(command)
        run_worker([], command, base_folder, output, 2)
        return output

    return run


@pytest.fixture(scope="module", params=["eight_gpus", "fsdp2", "zero2", "zero3"])
def name(request: pytest.FixtureRequest) -> str:
    """Name of a launch file, whose packages are installed."""
    if request.param.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e '.[train-deepspeed]'")
    return request.param


@pytest.fixture(scope="module")
def command(name: str) -> str:
    """Command of the worker; a run under ZeRO-3 has no EMA."""
    return "launched_without_ema" if name == "zero3" else "launched"


@pytest.fixture(scope="module")
def two(name: str, command: str, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two processes that a launch file starts, in float32 instead of its bfloat16."""
    output = tmp_path_factory.mktemp(name)
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "29412"]
    launcher = ["-m", launch.__name__, "--config_file", LAUNCH / f"{name}.yaml", *options]
    # accelerate has no DeepSpeed where it is told to use the CPU, but takes the device that it is given
    variables = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu"}
    run_worker(launcher, command, base_folder, output, 1, **variables if name.startswith("zero") else {})
    return output


def test_losses_and_norms_are_those_of_one_process(
    one: Callable[[str], Path], two: Path, command: str
) -> None:
    expected, actual = (read_metrics(folder / "metrics.csv") for folder in (one(command), two))
    assert [row["update"] for row in actual] == UPDATES
    for column in ("loss", "gradient_norm", "validation_loss"):
        values = [row[column] for row in expected]
        assert [row[column] for row in actual] == pytest.approx(values, rel=1e-3), column


@pytest.mark.parametrize("checkpoint", ["easyref-1", "easyref"])
def test_checkpoints_are_those_of_one_process(
    one: Callable[[str], Path], two: Path, command: str, checkpoint: str
) -> None:
    start = load_file(tiny.GOLDEN_START["start"])
    expected, actual = (load_file(folder / f"{checkpoint}.safetensors") for folder in (one(command), two))
    assert expected.keys() == actual.keys() == start.keys()
    moved = sum((expected[name] - start[name].float()).norm() for name in start)
    assert moved > 0.01
    assert sum((expected[name] - actual[name]).norm() for name in start) <= 1e-3 * moved


def test_sheets_and_states_are_written(two: Path) -> None:
    assert [int(path.stem) for path in sorted((two / "samples").glob("*.png"))] == UPDATES
    assert list(saved_states(two)) == [2, 3]
