"""Latency: seconds of preparing a group and of painting an image, by method and number of references.

`generate` appends a line for each group to latency-<process>.jsonl beside the method's images; `score`
collects the means in latency.csv for the report.
"""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .rows import write_csv
from .training_seeds import pooled_name

if TYPE_CHECKING:
    import torch

LATENCY, PATTERN = "latency.csv", "latency-*.jsonl"


@dataclass(frozen=True)
class Timing:
    """Seconds of one group."""

    references: int
    prepare: float  # of the group: its tokens, embeddings, or LoRA
    paint: float  # of one image, in a batch
    device: str
    is_first: bool  # in the first batch of a process, with warm-up


@dataclass(frozen=True)
class Latency:
    """Mean seconds of the groups of one size; the fields are the columns of latency.csv."""

    method: str
    device: str
    references: int
    groups: int
    prepare: float
    paint: float


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    return f"{name} {device.type}, {torch.get_num_threads()} threads"


def append_timings(folder: Path, rank: int, timings: Iterable[Timing]) -> None:
    """Append one line for each group to the file of a process."""
    with (folder / PATTERN.replace("*", str(rank))).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(timing)) + "\n" for timing in timings)


def collect(methods: Iterable[Path]) -> list[Latency]:
    """Means over the groups of each size; first batches count only where there are no others."""
    timings: dict[tuple[str, str, int], list[Timing]] = {}
    for method in methods:
        for file in sorted(method.glob(PATTERN)):
            for timing in _read(file):
                key = pooled_name(method.name), timing.device, timing.references
                timings.setdefault(key, []).append(timing)
    latencies = []
    for key, all_of in sorted(timings.items()):
        chosen = [timing for timing in all_of if not timing.is_first] or all_of
        means = (sum(getattr(t, name) for t in chosen) / len(chosen) for name in ("prepare", "paint"))
        latencies.append(Latency(*key, len(chosen), *means))
    return latencies


def write_latencies(folder: Path, latencies: Iterable[Latency]) -> None:
    """Write latency.csv."""
    write_csv(folder / LATENCY, tuple(Latency.__dataclass_fields__), map(asdict, latencies))


def read_latencies(folder: Path) -> list[Latency]:
    """Load latency.csv of a results folder; [] if there is none."""
    file = folder / LATENCY
    if not file.is_file():
        return []
    numbers = {"references": int, "groups": int, "prepare": float, "paint": float}
    with file.open(newline="", encoding="utf-8") as content:
        return [
            Latency(**{key: numbers.get(key, str)(value) for key, value in line.items()})
            for line in csv.DictReader(content)
        ]


def _read(file: Path) -> Iterable[Timing]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield Timing(**json.loads(line))
        except ValueError:  # the last line of a killed process
            continue
