"""The report on a GPU, at small sizes on a CPU: every part's rows, isolation, time limits, and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tools.bench.gpu_parts import compiled, edit, encode, fp8, golden, report, step, weights
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.gpu_parts.runner import (
    PARTS,
    Outcome,
    Part,
    end_tree,
    file_of,
    options_of,
    run_part,
    run_parts,
    run_process,
)
from tools.bench.report import Limit, Row, entry, row_of
from tools.bench.roofline import OperationFloor, Peak
from tools.bench.synchronizations import synchronizations

QUICK = GpuOptions(quick=True, pairs=1, references=(2,))


def silent(_: str) -> None:
    pass


@torch.no_grad()
def rows_of(part, options: GpuOptions = QUICK) -> list[Row]:
    return list(part.measure(options, silent))


def test_golden_data_are_within_the_limit() -> None:
    rows = rows_of(golden)
    assert len(rows) == 2 * (4 + 1)
    assert all(row.met for row in rows)


def test_encode_compares_with_the_roofline_and_transformers() -> None:
    rows = rows_of(encode)
    (roofline,) = [row for row in rows if row.name.endswith("cold; to the roofline")]
    (floor,) = [row.value for row in rows if "roofline of counted" in row.name]
    assert roofline.ratio == pytest.approx(roofline.value / floor)
    assert any("cold / transformers" in row.name for row in rows)
    (operations,) = [row for row in rows if "single operations" in row.name]
    assert operations.value > 0


def test_edit_measures_from_images_to_tokens() -> None:
    names = " ".join(row.name for row in rows_of(edit))
    for measured in ("prompt edit", "hashing and planning", "one added", "prompt changed"):
        assert measured in names


def test_step_adds_no_synchronization() -> None:
    (row,) = [row for row in rows_of(step) if "that references add" in row.name]
    assert row.met


@pytest.mark.thorough
def test_compiled_step_is_the_eager_one() -> None:
    (row,) = [row for row in rows_of(compiled) if "distance from the eager" in row.name]
    assert row.value <= 1e-5


def test_fp8_holds_half() -> None:
    rows = rows_of(fp8)
    assert rows[0].met
    assert 0.99 < rows[-1].value < 0.9999


def test_weights_have_a_size_and_are_loaded() -> None:
    assert [row.unit for row in rows_of(weights)] == ["GiB", "s"]


# Synchronizations and rooflines


def test_synchronizations_inside_the_module_are_counted() -> None:
    module = torch.nn.ReLU()

    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> float:
            return x.sum().item()

    def outside_as_well(of: torch.nn.Module) -> None:
        torch.ones(2).sum().item()
        of(torch.ones(2))

    assert synchronizations(module, lambda: outside_as_well(module)).total() == 0
    assert synchronizations(waits := Waits(), lambda: outside_as_well(waits)).total() == 1


def test_call_without_the_module_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="did not run the module's forward"):
        synchronizations(torch.nn.ReLU(), lambda: None)


def test_floor_of_operations_by_hand() -> None:
    """A product bound by operations, an addition bound by bytes; a view moves nothing."""
    a, peak = torch.ones(64, 64), Peak(torch.float32, flops=1e3, bytes=1e6)
    with OperationFloor(peak) as floor:
        (a @ a).t().add(1)
    assert floor.launches == 2
    assert floor.operations == 2 * 64**3
    assert floor.seconds == pytest.approx(2 * 64**3 / 1e3 + 2 * a.nbytes / 1e6)


# Processes and limits


@pytest.fixture
def options(tmp_path: Path) -> GpuOptions:
    return GpuOptions(quick=True, pairs=1, folder=tmp_path)


ROW = Row("first", 1.0, "s", wanted=Limit("<=", 2.0))


def command_of(options: GpuOptions, text: str) -> Path:
    """A command in place of gpu.py, which has stored one row of "edit" and half of another before."""
    half = '{"name": "sec'
    file_of("edit", options, "jsonl").write_text(f"{json.dumps(entry(ROW))}\n{half}", encoding="utf-8")
    file = options.folder / "command.py"
    file.write_text(text, encoding="utf-8")
    return file


def test_part_that_fails_leaves_its_rows_and_the_others(options: GpuOptions) -> None:
    command = command_of(options, "raise ValueError('no such device')")
    first, second = run_parts(["edit", "fp8 storage"], options, 3600, silent, command)
    assert first.problem == "Failed: ValueError: no such device"
    assert first.rows == (ROW,)
    assert "Traceback" in first.details
    assert second.problem.startswith("Failed")


def test_part_is_ended_at_its_limit(options: GpuOptions) -> None:
    command = command_of(options, "import time\ntime.sleep(3600)")
    outcome = run_process("edit", options, 1.0, command)
    assert outcome.problem.startswith("Ended after its limit of 1 s")
    assert outcome.rows == (ROW,)


def test_children_are_ended_too() -> None:
    waits = "import time; time.sleep(3600)"
    starts = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {waits!r}]).pid)"
    arguments = [sys.executable, "-c", f"{starts}; sys.stdout.flush(); {waits}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(process.stdout.readline()))
        end_tree(process)
    assert not psutil.wait_procs([child], timeout=60)[1]


def test_parts_are_left_out_when_the_time_is_used_up(options: GpuOptions) -> None:
    (outcome,) = run_parts(["edit"], options, 0.0, silent)
    assert outcome.problem == "Left out: the 0 s for the whole report were used up."


def test_parts_of_comfyui_are_left_out_without_one(options: GpuOptions) -> None:
    (outcome,) = run_parts(["ComfyUI, step"], options, 60, silent)
    assert "--comfyui" in outcome.problem


def test_rows_are_stored_one_by_one(options: GpuOptions, monkeypatch) -> None:
    """As of a part that fails after its first row."""
    module = type(sys)("tools.bench.gpu_parts.failing")

    def measure(_: GpuOptions, __):
        yield Row("first", 1.0, "s")
        raise ValueError("broken")

    module.measure = measure
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(PARTS, "failing", Part("failing", 1.0))
    with pytest.raises(ValueError, match="broken"):
        run_part("failing", options, silent)
    (line,) = file_of("failing", options, "jsonl").read_text().splitlines()
    assert row_of(json.loads(line)) == Row("first", 1.0, "s")


# Options and the report


def test_sizes_are_small_on_a_cpu_and_full_on_a_gpu() -> None:
    fields = {"quick": False, "pairs": None, "references": None, "folder": None, "comfyui": None}
    small, full = (options_of(fields | {"device": device}) for device in ("cpu", "cuda"))
    assert (small.quick, full.quick) == (True, False)
    assert full.references == (1, 4, 8, 16, 112)
    assert options_of(fields | {"device": "cuda", "pairs": 2}).pairs == 2


def test_stored_row_is_the_row() -> None:
    row = Row("a", 2.0, "s", 1.5, (1.4, 1.6), Limit("<=", 1.02))
    assert row_of(json.loads(json.dumps(entry(row)))) == row


def test_report_has_limits_first_and_names_problems() -> None:
    outcomes = [
        Outcome("edit", (Row("slow", 3.0, "s", wanted=Limit("<=", 2.0)), Row("size", 1.0, "GiB")), 4.0),
        Outcome("SDXL step", (), 1.0, "Failed: ValueError: x", "Traceback\nValueError: x"),
    ]
    text = report.markdown({"GPU 0": "y"}, outcomes, GpuOptions())
    assert text.index("| slow | 3 s |") < text.index("## edit (4 s)") < text.index("| size |")
    assert "Failed: ValueError: x\n\n```\nTraceback" in text
    stored = json.loads(report.as_json({"GPU 0": "y"}, outcomes, GpuOptions()))
    assert [part["part"] for part in stored["parts"]] == ["edit", "SDXL step"]
    assert stored["parts"][0]["rows"][0]["met"] is False
    assert "goals of speed are not judged" in report.markdown({}, outcomes, QUICK)
