"""Sums and products in the memory of their second term, unless a gradient may want it; the same numbers either way.

The second term must be the caller's own. Large new tensors cost more than the arithmetic, on a CPU above all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def add_in_place(x: Tensor, own: Tensor) -> Tensor:
    """x + own."""
    return own.add_(x) if _may_hold(own, x) else x + own


def mul_in_place(x: Tensor, own: Tensor) -> Tensor:
    """x * own."""
    return own.mul_(x) if _may_hold(own, x) else x * own


def _may_hold(own: Tensor, x: Tensor) -> bool:
    """Whether the result can lie in `own`: no gradient wants it, and its type is the one that the two together make."""
    wanted = own.requires_grad or x.requires_grad
    return not wanted and own.dtype == torch.promote_types(x.dtype, own.dtype)
