"""Sums and products that overwrite their second operand, because allocating large results is slow on a CPU.

A new tensor is returned instead where autograd needs the operands or the result has another dtype. The
numbers are the same either way. The second operand must not be used afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def add_in_place(x: Tensor, buffer: Tensor) -> Tensor:
    """x + buffer, written to `buffer` where possible."""
    return buffer.add_(x) if _can_overwrite(buffer, x) else x + buffer


def mul_in_place(x: Tensor, buffer: Tensor) -> Tensor:
    """x * buffer, written to `buffer` where possible."""
    return buffer.mul_(x) if _can_overwrite(buffer, x) else x * buffer


def _can_overwrite(buffer: Tensor, x: Tensor) -> bool:
    """True if neither operand requires a gradient and `buffer` has the dtype of the result."""
    needs_grad = buffer.requires_grad or x.requires_grad
    return not needs_grad and buffer.dtype == torch.promote_types(x.dtype, buffer.dtype)
