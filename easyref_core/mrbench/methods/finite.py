"""Checks that stop a method at the first value that is not finite, before an image is saved or scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss, weight, condition or image with NaN or infinite values."""


def require_finite(what: str, values: Any, where: str, remedy: str) -> None:
    """Raise NotFiniteError unless all values are finite: numbers, tensors, sequences and mappings of them.

    what: the thing, such as "the loss". where: method, group, step or seed. remedy: a whole sentence.
    """
    tensors = [tensor for tensor in tensors_of(values) if not torch.isfinite(tensor).all()]
    if tensors:
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
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
