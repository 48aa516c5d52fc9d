"""Roofline of a device: the least time of counted operations and bytes at its measured peaks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.bench.report import Row
from tools.bench.timing import seconds

SIDES = {"cuda": 8192}  # of the square matrices that are multiplied and copied
SMALL_SIDE = 1024  # elsewhere, because a CPU takes seconds for the larger ones
RUNS = 5  # of each; the fastest counts

aten = torch.ops.aten
# the registry has no formula for a CPU's flash attention
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}


class Peak(NamedTuple):
    """Measured peaks of a device."""

    dtype: torch.dtype
    flops: float  # per second, of a large matrix product
    bytes: float  # per second, read and written, of a large copy

    def seconds(self, flops: float, moved: float) -> float:
        """Least time of these operations and bytes, if they overlap perfectly."""
        return max(flops / self.flops, moved / self.bytes)

    def rows(self) -> list[Row]:
        return [
            Row(f"peak of a large matrix product, {self.dtype}", self.flops / 1e12, "10^12 operations/s"),
            Row(f"peak of a large copy, {self.dtype}, read and written", self.bytes / 1e9, "10^9 bytes/s"),
        ]


@cache
def device_peak(dtype: torch.dtype, device: torch.device) -> Peak:
    """Measure the peaks of a device with matrices of random values."""
    side = SIDES.get(device.type, SMALL_SIDE)
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in "abc")
    product, copy = (
        min(seconds(call) for _ in range(RUNS))
        for call in (lambda: torch.mm(a, b, out=c), lambda: c.copy_(a))
    )
    return Peak(dtype, 2 * side**3 / product, 2 * a.nbytes / copy)


class OperationFloor(TorchDispatchMode):
    """Sums the least time of each operation, its operations and bytes at the device's peaks.

    Bytes are those of the tensors that an operation reads and writes. Views move nothing. An operation with
    no formula in torch.utils.flop_counter counts with its bytes alone.
    """

    def __init__(self, peak: Peak) -> None:
        super().__init__()
        self.peak, self.seconds = peak, 0.0
        self.operations = self.launches = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._overloadpacket in MOVING_NOTHING:
            return out
        formula = FORMULAS.get(func._overloadpacket)
        operations = formula(*args, **kwargs, out_val=out) if formula else 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.operations += operations
        self.launches += 1
        self.seconds += self.peak.seconds(operations, sum(tensor.nbytes for tensor in tensors))
        return out


# allocations, and the view that is not declared as one
MOVING_NOTHING = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten._unsafe_view}
