"""Throughput of the updates: samples and MLLM tokens per second, time spent waiting for data, peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .batches import Batch


class Throughput:
    """Iterator over batches that measures from its creation, or from the last `read`, on.

    Args:
        batches: of this process.
        processes: number of processes, which are taken to be equally fast.
        device: of the models.
    """

    def __init__(self, batches: Iterator[Batch], processes: int, device: torch.device) -> None:
        self.batches, self.processes, self.device = batches, processes, device
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.samples, self.tokens = time.perf_counter(), 0.0, 0, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.samples += len(batch.prompts)
        self.tokens += batch.input_ids.numel()
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of sample sheets and other work between updates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Values for the log since the last call."""
        seconds = time.perf_counter() - self.start
        values = {
            "samples_per_second": self.samples * self.processes / seconds,
            "tokens_per_second": self.tokens * self.processes / seconds,
            "waiting_for_data": self.waited / seconds,
        }
        if self.device.type == "cuda":
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._reset()
        return values
