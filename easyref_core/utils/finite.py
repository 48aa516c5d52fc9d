"""Checks that stop a method or a training run at the first value that is not finite, before it is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss, weight, condition or image with NaN or infinite values."""


def require_finite(
    what: str, values: Any, where: str, remedy: str, total: Callable[[int], int] = lambda count: count
) -> None:
    """Raise NotFiniteError unless all values are finite: numbers, tensors, sequences and mappings of them.

    what: the thing, such as "the loss". where: method, group, step or seed. remedy: a whole sentence.
    total: sum of a count over all processes, so that all of them stop together.
    """
    if bad := total(sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors_of(values))):
        raise NotFiniteError(
            f"{where}: {what} is not finite ({bad} values are NaN or infinite); wanted finite values only. "
            f"{remedy}"
        )


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Floating-point tensors of a number, a tensor, or nested sequences and mappings; others are skipped."""
    if isinstance(values, float):
        yield torch.tensor(values)
    elif isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_of(value)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from tensors_of(value)
