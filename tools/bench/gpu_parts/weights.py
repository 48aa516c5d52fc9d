"""Writes a checkpoint of the released layout with random weights, for the parts after it."""

from __future__ import annotations

from collections.abc import Iterator

from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.random_weights import write_released
from tools.bench.report import GIB, Row
from tools.bench.timing import Say, seconds


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Size of the file, and the seconds that loading it onto the device takes."""
    if options.quick:
        say("  the golden checkpoint takes the place of the full-size one")
    else:
        say("  writing random weights in the released layout")
        write_released(options.checkpoint)
    size = options.checkpoint.stat().st_size / GIB
    yield Row("checkpoint of the released layout, random weights", size, "GiB")
    yield Row(f"load it onto {options.device}, page cache warm", seconds(options.load_easyref), "s")
