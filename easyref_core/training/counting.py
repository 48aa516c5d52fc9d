"""Counting what a computation would take: it runs on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from torch import Tensor


class Counted(NamedTuple):
    """What one call takes."""

    operations: int  # additions and multiplications of matrix products, convolutions and attention
    peak: int  # bytes of all tensors it makes that live at one time


def count(call: Callable[[], Any]) -> Counted:
    """Operations and peak memory of a call on meta tensors, its backward pass included where it runs one.

    Weights and inputs, made before, are not in the peak; gradients of weights are unless the call lets go of them.
    """
    with flash_attention(), FlopCounterMode(display=False) as operations, LiveBytes() as live:
        call()
    return Counted(operations.get_total_flops(), live.peak)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Take every attention for one that keeps no attention matrix, as on a GPU; the meta device's own keeps them.

    Registered with the dispatcher, because a TorchFunctionMode is not on in what backward recomputes.
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
    attn_mask: Tensor | None = None,  # costs no more
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are made while it is on and still live, and remembers the most there were."""

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
            if name not in before:  # a view, and an operation in place, make nothing new
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
