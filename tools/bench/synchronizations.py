"""Count of the places where a module's forward waits for the device, found by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "profiled forward"
# Operations that read a value of a device's tensor; all that can be seen on a CPU, where nothing waits.
READING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
DRIVER = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


def synchronizations(module: torch.nn.Module, call: Callable[[], Any]) -> Counter[str]:
    """Synchronizations inside the module's forward while `call` runs, by name.

    On a GPU, the driver's calls; on a CPU, the operations that would synchronize there.
    """
    on_gpu = torch.cuda.is_available()
    names = DRIVER if on_gpu else READING
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ranged(module), profile(activities=activities) as profiled:
        call()
    events = profiled.events()
    # a GPU has a range of the same name, which ends later
    ranges = [event for event in events if event.name == RANGE and event.device_type == DeviceType.CPU]
    forwards = [event.time_range for event in ranges]
    if not forwards:
        raise RuntimeError("The profiled call did not run the module's forward. Profile a call that runs it.")
    return Counter(
        event.name
        for event in events
        if event.name in names and any(span.start <= event.time_range.start <= span.end for span in forwards)
    )


@contextmanager
def ranged(module: torch.nn.Module) -> Iterator[None]:
    """Name the module's forward in profiles."""
    ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(RANGE))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
