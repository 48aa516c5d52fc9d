"""Sums and products in the memory of their second term, unless a gradient may want it; the same numbers either way.

The second term must be the caller's own. Large new tensors cost more than the arithmetic, on a CPU above all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def plus(x: Tensor, own: Tensor) -> Tensor:
    """x + own."""
    return x + own if own.requires_grad or x.requires_grad else own.add_(x)


def times(x: Tensor, own: Tensor) -> Tensor:
    """x * own."""
    return x * own if own.requires_grad or x.requires_grad else own.mul_(x)
