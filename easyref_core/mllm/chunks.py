"""Work that goes on in smaller pieces where memory does not suffice for all of it at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

# How a CPU, cuBLAS and cuDNN, Apple's GPU and DirectML say it, in a plain RuntimeError.
MESSAGES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "status_alloc_failed",
    "could not allocate",
)
QUOTED = 200  # characters of what the allocator says


def run_in_chunks(
    count: int,
    at_once: Callable[[int], int],
    least: int,
    run: Callable[[int, int], None],
    put_back: Callable[[], None],
    remedy: str,
) -> None:
    """run(start, end) for all of 0 .. count; where memory is short again in halves, down to `least`.

    at_once: how many there are in a piece, from where it starts. put_back: makes good what a run that raised has left,
    and gives memory back, before the next attempt.
    Raises torch.OutOfMemoryError, with the remedy, where a piece of `least` does not fit either.
    """
    start, fit = 0, count
    while start < count:
        end = min(start + max(least, min(fit, at_once(start))), count)
        try:
            run(start, end)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if end - start <= least:
                said = (str(error) or type(error).__name__).splitlines()[0][:QUOTED]
                raise torch.OutOfMemoryError(f"{remedy} ({said})") from error
        else:
            start = end
            continue
        # out of the except clause, as an error holds on to the tensors of the frames it came through
        fit = (end - start) // 2
        put_back()


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how some device says that it has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in MESSAGES)
