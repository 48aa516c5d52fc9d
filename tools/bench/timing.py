"""Time in interleaved pairs, and the most memory that a call takes."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch

from tools.bench.rows import Limit, Row

STATUS = Path("/proc/self/status")
WATCHED_EVERY = 0.005  # seconds

Call = Callable[[], Any]


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

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lower and upper quartile of the ratios; None of one pair."""
        if len(self.ratios) < 2:
            return None
        lower, _, upper = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return lower, upper

    def row(self, name: str, wanted: Limit | None = None) -> Row:
        """Seconds of the second way, and its ratio to the first."""
        return Row(name, self.medians[1], "s", self.ratio, self.spread, wanted)


def interleaved(
    first: Call, second: Call, pairs: int, say: Callable[[str], None] = lambda _: None, device: str = "cpu"
) -> Pairs:
    """Time two calls in turn: A B, B A, A B, ... after one run of each that is not counted."""
    ways, found = (first, second), ([], [])
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again between the calls
    try:
        for way in ways:
            seconds(way, device)
        for pair in range(pairs):
            for place in (0, 1) if pair % 2 == 0 else (1, 0):
                found[place].append(seconds(ways[place], device))
            say(f"  pair {pair + 1} of {pairs}: {found[0][-1]:.3f} s, {found[1][-1]:.3f} s")
    finally:
        gc.unfreeze()
    return Pairs(*map(tuple, found))


def seconds(call: Call, device: str = "cpu") -> float:
    """How long a call takes, what it left to do on a GPU included."""
    gc.collect()
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def anonymous_bytes() -> int | None:
    """This process's anonymous memory: what it holds itself, without pages of mapped files. None but on Linux."""
    if not STATUS.exists():
        return None
    line = next(
        line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


class Peak:
    """The most memory while a block runs, above what there was before, in bytes.

    Of a GPU what its tensors take, of a CPU the process's anonymous memory; None where neither is known.
    """

    added: int | None = None


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Peak]:
    """Watch the memory of the device while the block runs."""
    gc.collect()
    peak = Peak()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.added = torch.cuda.max_memory_allocated(device) - before
        return
    _give_back()
    before, done = anonymous_bytes(), Event()
    if before is None:
        yield peak
        return
    peak.added = 0

    def watch() -> None:
        while not done.is_set():
            peak.added = max(peak.added, anonymous_bytes() - before)
            done.wait(WATCHED_EVERY)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak.added = max(peak.added, anonymous_bytes() - before)
        done.set()
        watcher.join()


def _give_back() -> None:
    """Freed memory that the allocator keeps would be taken again unseen. Of glibc; elsewhere there is no such call."""
    if STATUS.exists() and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
