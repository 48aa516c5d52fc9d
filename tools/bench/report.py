"""Options and rows of the benchmarks, and their report: the machine, a Markdown table, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

GIB = 2**30
PACKAGES = ("torch", "transformers", "diffusers", "safetensors")
HEAD = ("what", "value", "ratio", "spread", "wanted", "met")
MET = {True: "yes", False: "**no**", None: ""}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line, the same for every part."""

    quick: bool = False  # small shapes and few pairs, for tests: seconds in all
    pairs: int = 5  # interleaved pairs of each comparison
    references: tuple[int, ...] = (1, 2, 4, 8, 16, 112)  # group sizes to encode
    pixels: tuple[int, ...] = (256, 512)  # sides of the images that are timed, CFG
    device: str = "cpu"

    @property
    def unet_name(self) -> str:
        """Name of the UNet whose step is measured."""
        return "small UNet" if self.quick else "SDXL"


class Limit(NamedTuple):
    """Bound on a row: on its ratio if it has one, else on its value."""

    sign: str  # "<=" or ">="
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure."""

    name: str  # what was measured, with the shapes that matter, and the baseline of the ratio
    value: float
    unit: str  # of the value: "s", "GiB", "10^9 operations", "%", ...
    ratio: float | None = None  # to the baseline in the name
    spread: tuple[float, float] | None = None  # lower and upper quartile of the pairs' ratios
    wanted: Limit | None = None

    @property
    def met(self) -> bool | None:
        """True if the figure is within its limit; None without one."""
        if self.wanted is None:
            return None
        return self.wanted.met(self.value if self.ratio is None else self.ratio)

    def cells(self) -> tuple[str, ...]:
        spread = "" if self.spread is None else f"{self.spread[0]:.4g} to {self.spread[1]:.4g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.4g}"
        value, wanted = f"{self.value:.4g} {self.unit}", str(self.wanted or "")
        return self.name, value, ratio, spread, wanted, MET[self.met]


def parser(about: str | None) -> argparse.ArgumentParser:
    """A command line with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the rows to")
    parser.add_argument("--pairs", type=int, help=f"of each comparison ({Options.pairs})")
    sides = "sides of the images that are timed, as 256,512"
    parser.add_argument("--pixels", type=numbers, default=Options.pixels, help=sides)
    return parser


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def describe() -> dict[str, str]:
    """The machine, for the head of a report."""
    memory = psutil.virtual_memory()
    machine = {
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "load when it began": f"{psutil.getloadavg()[0]:.1f} running",
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    machine |= {package: _version(package) for package in PACKAGES}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        machine[f"GPU {number}"] = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return machine


def markdown(machine: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The machine, and one line a row."""
    return f"{machine_list(machine)}\n\n{table(rows)}"


def machine_list(machine: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in machine.items())


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line a row."""
    lines = [HEAD, ("---", "---:", "---:", "---:", "---:", "---"), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def entry(row: Row) -> dict[str, Any]:
    """A row for JSON: "name", "value", "unit", "ratio", "spread", "wanted" and "met"."""
    return dataclasses.asdict(row) | {"wanted": row.wanted and str(row.wanted), "met": row.met}


def row_of(stored: Mapping[str, Any]) -> Row:
    """The row of an entry."""
    fields = {name: stored[name] for name in ("name", "value", "unit", "ratio")}
    wanted = stored["wanted"] and Limit(*_limit_fields(stored["wanted"]))
    return Row(**fields, spread=stored["spread"] and tuple(stored["spread"]), wanted=wanted)


def _limit_fields(text: str) -> tuple[str, float]:
    sign, bound = text.split()
    return sign, float(bound)


def write_json(file: Path, machine: Mapping[str, str], rows: Sequence[Row]) -> None:
    """{"machine": {...}, "rows": [entry, ...]}"""
    text = json.dumps({"machine": dict(machine), "rows": [entry(row) for row in rows]}, indent=1) + "\n"
    file.write_text(text, encoding="utf-8")


def publish(machine: Mapping[str, str], rows: Sequence[Row], file: Path | None) -> None:
    """Print the report, and write it as JSON if a file is given."""
    print(f"\n{markdown(machine, rows)}", flush=True)
    if file:
        write_json(file, machine, rows)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
