"""Runs each part in a process of its own, within its time limit and that of the whole report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from tools.bench.gpu_parts.modes import MODES
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Row, entry, row_of
from tools.bench.timing import Say

COMMAND = Path(__file__).parents[1] / "gpu.py"
SHORTEST = 5.0  # seconds; with less left, a part is not started
GPU_PAIRS, QUICK_PAIRS = 5, 1
PATIENCE_ON_CPU = 6  # times the limits of the parts, which are those of a GPU
LAST_LINES = 12  # of a failed part's errors


class Part(NamedTuple):
    """One part. arguments: of its module's `measure`, before the options."""

    module: str
    limit: float  # seconds, on a GPU
    needs_comfyui: bool = False
    arguments: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """Rows of one part, and the reason why there are not more of them; "" if all are there."""

    part: str
    rows: tuple[Row, ...]
    seconds: float
    problem: str = ""
    details: str = ""  # last lines of its errors


# in the order in which they run; compiling takes the longest, and is last
PARTS: dict[str, Part] = {
    "golden data": Part("golden", 40),
    "full-size weights": Part("weights", 60),
    "cold encode": Part("encode", 90),
    "edit": Part("edit", 45),
    "SDXL step": Part("step", 60),
    "fp8 storage": Part("fp8", 20),
    "ComfyUI, step": Part("host_step", 60, needs_comfyui=True),
    "ComfyUI, weights": Part("host_weights", 45, needs_comfyui=True),
    **{f"ComfyUI, {mode}": Part("host_modes", 45, needs_comfyui=True, arguments=(mode,)) for mode in MODES},
    "torch.compile": Part("compiled", 90),
    "ComfyUI, torch.compile": Part("host_compiled", 90, needs_comfyui=True),
}


def run_part(name: str, options: GpuOptions, say: Say) -> None:
    """Measure one part in this process, and append each row to its file as a line of JSON."""
    part = PARTS[name]
    module = import_module(f"tools.bench.gpu_parts.{part.module}")
    with file_of(name, options, "jsonl").open("a", encoding="utf-8") as file, torch.no_grad():
        for row in module.measure(*part.arguments, options, say):
            file.write(json.dumps(entry(row)) + "\n")
            file.flush()


def run_parts(
    names: Sequence[str], options: GpuOptions, total: float, say: Say, command: Path = COMMAND
) -> list[Outcome]:
    """Run parts of PARTS one after another; total: seconds that all may take together."""
    deadline, outcomes = time.monotonic() + total, []
    for name in names:
        part = PARTS[name]
        say(f"{name}:")
        left = deadline - time.monotonic()
        if part.needs_comfyui and options.comfyui is None:
            problem = "Left out: no ComfyUI was given (--comfyui FOLDER)."
            outcomes.append(Outcome(name, (), 0.0, problem))
        elif left < SHORTEST:
            problem = f"Left out: the {total:.0f} s for the whole report were used up."
            outcomes.append(Outcome(name, (), 0.0, problem))
        else:
            limit = part.limit * (PATIENCE_ON_CPU if options.device == "cpu" else 1)
            outcomes.append(run_process(name, options, min(limit, left), command))
        say(f"  {outcomes[-1].problem or 'done'} ({outcomes[-1].seconds:.0f} s)")
    return outcomes


def run_process(name: str, options: GpuOptions, limit: float, command: Path = COMMAND) -> Outcome:
    """Run one part in a process of its own, and end it with all its children after `limit` seconds."""
    rows_file, errors = (file_of(name, options, kind) for kind in ("jsonl", "errors"))
    rows_file.touch()
    start = time.monotonic()
    with errors.open("w", encoding="utf-8") as stream:
        arguments = [sys.executable, str(command), *flags(options), "--part", name]
        # temporary files of a killed process are removed with the folder
        environment = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(options.folder))
        if options.quick:  # models this small only wait for threads that spin
            environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        process = subprocess.Popen(arguments, stderr=stream, env=os.environ | environment)
        try:
            code, problem = process.wait(limit), ""
        except subprocess.TimeoutExpired:
            code, problem = None, f"Ended after its limit of {limit:.0f} s; the rows are those until then."
            end_tree(process)
    took = time.monotonic() - start
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()
    if code:
        problem = f"Failed: {lines[-1] if lines else f'exit code {code}'}"
    stored = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)
    # a process that is killed may leave half a line
    rows = tuple(row_of(json.loads(line)) for line in stored if line.endswith("\n"))
    return Outcome(name, rows, took, problem, "\n".join(lines[-LAST_LINES:]) if problem else "")


def file_of(name: str, options: GpuOptions, kind: str) -> Path:
    """A file of one part in the shared folder."""
    return options.folder / f"{re.sub('[^A-Za-z0-9]+', '_', name)}.{kind}"


def end_tree(process: subprocess.Popen) -> None:
    """Kill a process and those that it started, such as a server."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def flags(options: GpuOptions) -> list[str]:
    """The command line of a part's process with these options."""
    written = ["--device", options.device, "--pairs", str(options.pairs), "--folder", str(options.folder)]
    written += ["--references", ",".join(map(str, options.references))]
    written += ["--quick"] if options.quick else []
    return written + (["--comfyui", str(options.comfyui)] if options.comfyui else [])


def options_of(fields: Mapping[str, object]) -> GpuOptions:
    """Options of a command line; without a GPU, small sizes."""
    quick = bool(fields["quick"]) or fields["device"] == "cpu"
    defaults = (
        {"pairs": QUICK_PAIRS, "references": (1, 2)}
        if quick
        else {
            "pairs": GPU_PAIRS,
            "references": (1, 4, 8, 16, 112),
        }
    )
    names = {field.name for field in dataclasses.fields(GpuOptions)}
    given = {name: value for name, value in fields.items() if name in names and value is not None}
    return GpuOptions(**(defaults | given | {"quick": quick}))
