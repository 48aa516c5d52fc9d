"""Two processes (gloo, CPU) by the launch files, with all weights or sharded: results of one process.

Those of DeepSpeed run where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from safetensors.torch import load_file

from easyref_core.training.resume import saved_states
from easyref_core.training.run_log import read_metrics

from . import tiny
from .test_distributed import run_worker
from .test_launch import LAUNCH

pytestmark = pytest.mark.thorough

UPDATES = [1, 2, 3]

# Relative differences of two processes from one. ZeRO-3 computes in float32, the others in float64.
TOLERANCE = {"eight_gpus": 1e-3, "fsdp2": 1e-3, "zero2": 1e-3, "zero3": 1e-2}


@pytest.fixture(scope="module")
def one(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function (worker's command) -> output folder of one process with double the batch."""

    @cache
    def run(command: str) -> Path:
        output = tmp_path_factory.mktemp(command)
        run_worker([], base_folder, command, output, 2)
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
    run_worker(launcher, base_folder, command, output, 1, **variables if name.startswith("zero") else {})
    return output


def test_losses_and_norms_are_those_of_one_process(
    one: Callable[[str], Path], two: Path, name: str, command: str
) -> None:
    expected, actual = (read_metrics(folder / "metrics.csv") for folder in (one(command), two))
    assert [row["update"] for row in actual] == UPDATES
    for column in ("loss", "gradient_norm", "validation_loss"):
        values = [row[column] for row in expected]
        assert [row[column] for row in actual] == pytest.approx(values, rel=TOLERANCE[name]), column


@pytest.mark.parametrize("checkpoint", ["easyref-1", "easyref"])
def test_checkpoints_are_those_of_one_process(
    one: Callable[[str], Path], two: Path, name: str, command: str, checkpoint: str
) -> None:
    start = load_file(tiny.GOLDEN_START["start"])
    expected, actual = (load_file(folder / f"{checkpoint}.safetensors") for folder in (one(command), two))
    assert expected.keys() == actual.keys() == start.keys()
    moved = sum((expected[key] - start[key].float()).norm() for key in start)
    assert moved > 0.01
    difference = sum((expected[key] - actual[key]).norm() for key in start)
    assert difference <= TOLERANCE[name] * moved


def test_sheets_and_states_are_written(two: Path) -> None:
    assert [int(path.stem) for path in sorted((two / "samples").glob("*.png"))] == UPDATES
    assert list(saved_states(two)) == [2, 3]


@pytest.fixture(scope="module")
def in_bfloat16(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Output folders of one process and of two under FSDP2, both in bfloat16."""
    outputs = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    run_worker([], base_folder, "launched", outputs[0], 2, ACCELERATE_MIXED_PRECISION="bf16")
    launcher = ["-m", launch.__name__, "--config_file", LAUNCH / "fsdp2.yaml", "--num_processes", "2"]
    run_worker([*launcher, "--main_process_port", "29413"], base_folder, "launched", outputs[1], 1)
    return outputs


def test_fsdp2_in_bfloat16_rounds_no_more_than_one_process(
    one: Callable[[str], Path], in_bfloat16: list[Path]
) -> None:
    """Losses are within 1 % of float64, and weights move as one process moves them, but for rounding."""
    exact = one("launched")
    expected, actual = (read_metrics(folder / "metrics.csv") for folder in (exact, in_bfloat16[1]))
    for column in ("loss", "validation_loss"):
        values = [row[column] for row in expected]
        assert [row[column] for row in actual] == pytest.approx(values, rel=1e-2), column
    start = load_file(tiny.GOLDEN_START["start"])
    moves = []
    for folder in (exact, *in_bfloat16):
        tensors = load_file(folder / "easyref.safetensors")
        moves.append(torch.cat([(tensors[key] - start[key].float()).flatten() for key in start]))
    assert all(move.isfinite().all() for move in moves)
    target, single, sharded = moves
    # Adam's first updates have the signs of gradients, so rounding turns those of the smallest ones
    similarity = [torch.cosine_similarity(move, target, dim=0).item() for move in (single, sharded)]
    assert similarity[1] > max(0.5, similarity[0] - 0.1)
    assert sharded.norm().item() == pytest.approx(target.norm().item(), rel=0.1)
