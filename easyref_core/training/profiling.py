"""Trace of some updates by torch.profiler, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

SKIPPED = 2  # first updates of a start, which are slower than the others


def profiler(accelerator: Accelerator, folder: Path, updates: int) -> AbstractContextManager[Any]:
    """Profiler whose `step` is called after every update; it writes a trace of each process to `folder`.

    updates: number of updates that are traced, after SKIPPED others. 0: the profiler does nothing.
    """
    if not updates:
        return _NoProfiler()
    from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

    activities = [ProfilerActivity.CPU]
    if accelerator.device.type == "cuda" and torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED - 1, warmup=1, active=updates, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder), f"process{accelerator.process_index}"),
        profile_memory=True,
    )


class _NoProfiler(AbstractContextManager):
    """Context that profiles nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Do nothing."""
