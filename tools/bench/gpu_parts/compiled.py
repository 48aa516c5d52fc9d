"""torch.compile of a diffusers UNet with references, against the eager UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from devkit.golden import error
from tools.bench import unet_counts as counts
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.gpu_parts.step import MAX_SLOWER
from tools.bench.report import Row
from tools.bench.timing import Say, event_seconds, interleaved, seconds
from tools.bench.unet import random_ways

QUICK_BACKEND, BACKEND = "eager", "inductor"


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Seconds of compiling, error to the eager step, and time against it and against unpatched."""
    ways = random_ways(options, say)
    if ways is None:
        return
    backend, pixels = QUICK_BACKEND if options.quick else BACKEND, options.step_pixels
    inputs = counts.inputs(pixels, ways.unet.dtype, options.device)
    compiled = ways._replace(unet=torch.compile(ways.unet, backend=backend))
    name = f"torch.compile ({backend}), {options.unet_name}, step at {pixels} x {pixels}, CFG"
    eager, patched, bare = (
        partial(way.step, processors, inputs)
        for way, processors in ((ways, ways.patched), (compiled, ways.patched), (compiled, ways.bare))
    )
    yield from compiled_rows(name, eager, patched, options, say)
    say(f"  {name}: compiling unpatched")
    pairs = interleaved(bare, patched, options.pairs, say, event_seconds)
    wanted = None if options.quick else MAX_SLOWER
    yield pairs.row(f"{name}: patched to unpatched, both compiled", wanted)


def compiled_rows(
    name: str, eager: Callable[[], Any], compiled: Callable[[], Any], options: GpuOptions, say: Say
) -> Iterator[Row]:
    """Compile by a first run, then compare with the eager step of the same references."""
    say(f"  {name}: compiling with references")
    outputs: list[Any] = []
    yield Row(f"{name}: compiling with references", seconds(lambda: outputs.append(compiled())), "s")
    yield Row(f"{name}: distance from the eager step", error(outputs[0], eager()), "of it")
    pairs = interleaved(eager, compiled, options.pairs, say, event_seconds)
    yield pairs.row(f"{name}: compiled to eager, both with references")
