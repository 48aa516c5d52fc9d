"""Time in interleaved pairs, and the most memory that a call takes."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any, NamedTuple

import psutil
import torch
from torch.utils.benchmark import timer  # waits for the accelerator

from easyref_core.training.frozen_heap import frozen_heap
from tools.bench.report import Limit, Row

SAMPLE_SECONDS = 0.005  # between two looks at the memory
Call = Callable[[], Any]
Say = Callable[[str], None]
Clock = Callable[[Call], float]


class Pairs(NamedTuple):
    """Seconds of two ways, run in turn."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def ratios(self) -> tuple[float, ...]:
        """second / first of every pair."""
        return tuple(b / a for a, b in zip(self.first, self.second, strict=True))

    def row(self, name: str, wanted: Limit | None = None) -> Row:
        """Median seconds of the second way; median and, of two pairs or more, quartiles of the ratios."""
        ratio, spread = statistics.median(self.ratios), None
        if len(self.ratios) > 1:
            lower, _, upper = statistics.quantiles(self.ratios, n=4, method="inclusive")
            spread = lower, upper
        return Row(name, self.medians[1], "s", ratio, spread, wanted)


def interleaved(
    first: Call, second: Call, pairs: int, say: Say = lambda _: None, clock: Clock | None = None
) -> Pairs:
    """Time two calls in turn: A B, B A, A B, ... after one run of each that is not counted.

    clock: `seconds` by default.
    """
    clock = clock or seconds
    ways, times = (first, second), ([], [])
    with frozen_heap():
        for way in ways:
            clock(way)
        for pair in range(pairs):
            for i in (0, 1) if pair % 2 == 0 else (1, 0):
                times[i].append(clock(ways[i]))
            say(f"  pair {pair + 1} of {pairs}: {times[0][-1]:.3f} s, {times[1][-1]:.3f} s")
    return Pairs(*map(tuple, times))


def seconds(call: Call) -> float:
    """Time of one call, until the accelerator has finished too.

    Not torch.utils.benchmark.Timer, which runs a call more than once: some calls here change what they
    measure.
    """
    gc.collect()
    start = timer()
    call()
    return timer() - start


def cpu_seconds(call: Call) -> float:
    """CPU time of one call, of all threads of the process."""
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def event_seconds(call: Call) -> float:
    """Time of one call between two CUDA events on the device; on a CPU, that of `seconds`."""
    if not torch.cuda.is_available():
        return seconds(call)
    gc.collect()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


class PeakMemory:
    """Context manager that records the most memory of a block, in bytes.

    added: above the memory before; of a GPU that of its tensors, of a CPU the process's anonymous memory,
        None where neither is known.
    anonymous, mapped: of the process's resident memory its own pages, and those of mapped files (Linux).
    """

    def __init__(self, device: str = "cpu") -> None:
        self.added: int | None = None
        self.anonymous = self.mapped = 0
        self._gpu = torch.device(device).type == "cuda"
        self._done, self._watcher = Event(), Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._gpu:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return self
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # freed memory that the allocator holds would be reused unseen
        self._sample()
        self._before = self.anonymous
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self.added = torch.cuda.max_memory_allocated() - self._before
            return
        self._sample()
        self._done.set()
        self._watcher.join()
        self.added = self.anonymous - self._before if self.anonymous else None

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        memory = psutil.Process().memory_info()
        if hasattr(memory, "shared"):
            self.anonymous = max(self.anonymous, memory.rss - memory.shared)
            self.mapped = max(self.mapped, memory.shared)
