"""Work that goes on in smaller pieces where memory does not suffice for all of it at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

# How a CPU, Apple's GPU and DirectML say it, in a plain RuntimeError.
MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "could not allocate")


def in_pieces(
    count: int,
    at_once: int,
    least: int,
    run: Callable[[int, int], None],
    free: Callable[[], None],
    remedy: str,
) -> None:
    """run(start, end) for all of 0 .. count, `at_once` in each; where memory is short half as many, down to `least`.

    run: must leave nothing behind where it raises. free: gives memory back before the next attempt.
    Raises torch.OutOfMemoryError, with the remedy, where a piece of `least` does not fit either.
    """
    start, at_once = 0, max(at_once, least)
    while start < count:
        end = min(start + at_once, count)
        try:
            run(start, end)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if end - start <= least:
                raise torch.OutOfMemoryError(f"{remedy} ({str(error).partition('.')[0]}.)") from error
        else:
            start = end
            continue
        # out of the except clause, as an error holds on to the tensors of the frames it came through
        at_once = max(least, (end - start) // 2)
        free()


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how some device says that it has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in MESSAGES)
