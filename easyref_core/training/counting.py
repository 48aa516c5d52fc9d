"""Counters of FLOPs and peak memory on the meta device, where tensors have shapes and no values.

FLOPs are counted by torch's FlopCounterMode. It cannot count memory, and it runs the meta device's attention,
which materializes the attention matrix; LiveBytes and flash_attention are for these.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .frozen_heap import frozen_heap

if TYPE_CHECKING:
    from torch import Tensor


PEAK_STEP = 1.01  # relative step of a peak


class Cost(NamedTuple):
    """Compute and memory of one call."""

    flops: int  # of matrix products, convolutions and attention; a multiply-add is 2
    peak_bytes: int  # maximum of the bytes of all tensors created by the call that are alive at one time


def count(call: Callable[[], Any]) -> Cost:
    """Count FLOPs and peak memory of a call on meta tensors, including the backward pass if it runs one.

    Existing weights and inputs are not part of the peak. Gradients of weights are, unless the call frees
    them.
    """
    with frozen_heap(), flash_attention(), FlopCounterMode(display=False) as counter, LiveBytes() as live:
        call()
    return Cost(counter.get_total_flops(), live.peak)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Replace attention on the meta device by flash attention, which stores no attention matrix, as on a GPU.

    It is registered with the dispatcher, because a TorchFunctionMode is off in recomputation during backward.
    """
    library = Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _flash, "AutogradMeta")
    try:
        yield
    finally:
        library._destroy()


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,  # does not change the cost
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


class LiveBytes(TorchDispatchMode):
    """Tracks the total and the peak size of living storages that were created while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = _storages((args, kwargs))
        out = func(*args, **kwargs)
        for name, storage in _storages(out).items():
            if name not in before:  # views and in-place operations reuse a storage
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._remove, size)
        if self.live > PEAK_STEP * self.peak:
            # Under a dispatch mode, torch's checkpoint leaves recomputed tensors in reference cycles, which
            # it does not without one.
            gc.collect()
            self.peak = max(self.peak, self.live)

    def _remove(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
