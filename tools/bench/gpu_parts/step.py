"""A step of SDXL's UNet with classifier-free guidance, with references against one without, in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tools.bench import unet_counts as counts
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Limit, Row
from tools.bench.synchronizations import synchronizations
from tools.bench.timing import Say, event_seconds, interleaved
from tools.bench.unet import memory_rows, random_ways, roofline_rows

MAX_SLOWER, NO_MORE = Limit("<=", 1.02), Limit("<=", 0)


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Time by CUDA events, eagerly and as CUDA graphs; memory; synchronizations inside the UNet."""
    ways = random_ways(options, say)
    if ways is None:
        return
    pixels, wanted = options.step_pixels, None if options.quick else MAX_SLOWER
    inputs = counts.inputs(pixels, ways.unet.dtype, options.device)
    bare, patched = (partial(ways.step, way, inputs) for way in (ways.bare, ways.patched))
    name = f"{options.unet_name}, step at {pixels} x {pixels}, CFG, {ways.unet.dtype}"
    say(f"  {name}: unpatched, patched")
    pairs = interleaved(bare, patched, options.pairs, say, event_seconds)
    yield pairs.row(f"{name}; patched to unpatched", wanted)
    same = interleaved(bare, bare, options.pairs, say, event_seconds)
    yield same.row(f"{name}; unpatched to itself: what the clock can tell")
    yield from memory_rows(bare, patched, name, options.device)
    yield from synchronization_rows(name, ways.unet, bare, patched)
    if options.device == "cpu":
        return
    yield from roofline_rows(ways.unet, name, patched, pairs.medians[1])
    say("  capturing both steps as CUDA graphs, which fails where one synchronizes")
    graphs = [capture(call) for call in (bare, patched)]
    replayed = interleaved(graphs[0].replay, graphs[1].replay, options.pairs, say, event_seconds)
    yield replayed.row(f"{name}, replayed as CUDA graphs; patched to unpatched", wanted)


def synchronization_rows(
    name: str, module: torch.nn.Module, bare: Callable[[], Any], patched: Callable[[], Any]
) -> Iterator[Row]:
    """Synchronizations of both steps, counted by the profiler; the patched one must have no more."""
    before, after = (synchronizations(module, call) for call in (bare, patched))
    found = ", ".join(f"{count} {event}" for event, count in sorted(before.items())) or "none"
    yield Row(f"{name}: synchronizations inside the unpatched UNet ({found})", before.total(), "of a step")
    label = f"{name}: synchronizations that references add inside the UNet"
    yield Row(label, after.total() - before.total(), "of a step", wanted=NO_MORE)


@torch.no_grad()
def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Record a call as a CUDA graph, after a run on a side stream as torch's documentation wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
