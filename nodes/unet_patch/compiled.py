"""torch.compile support: runs compiled if all guards can be expressed, otherwise eager with a warning.

ComfyUI compiles with all guards on transformer_options dropped, so a Python branch on anything in them is
frozen at the first trace, for later prompts of the process too. Therefore

- tensors in transformer_options (weighted K and V, masks) may change from call to call;
- everything else that an attention branches on is in a keyword argument of the UNet, `SIGNATURE`, whose guard
  is not dropped;
- outside its window an injection acts with V = 0, so that a step does not change the signature;
- where only guards on transformer_options could distinguish the attentions (blocks compiled one by one, a
  UNet that compiles into several graphs), the UNet runs uncompiled, with a warning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import WrappersMP

from ..host.log import warn_once

if TYPE_CHECKING:
    from torch import Tensor, nn

SIGNATURE = "easyref_signature"  # keyword argument of the UNet

# by UNet: `packs` of the signatures with which it compiles into several graphs
_split: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def is_compiled(model: Any, options: Mapping[str, Any]) -> bool:
    """True if the UNet of a model, or a part of it, is compiled in this call."""
    if is_optimized(model.diffusion_model):
        return True
    # a walk over all modules, so only where something may have replaced them by compiled ones
    others = len(options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})) > 1
    patched = getattr(model.current_patcher, "object_patches", {})
    if not others and not any(name.startswith("diffusion_model") for name in patched):
        return False
    return any(map(is_optimized, model.diffusion_model.modules()))


def is_optimized(module: nn.Module) -> bool:
    """True if torch.compile returned this module."""
    # torch._dynamo takes seconds to import; where it is not imported, nothing is compiled
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


class Signature(NamedTuple):
    """Everything that the attentions of a UNet call branch on, except tensors."""

    injections: str  # sites, and the shapes of K, V and masks
    packs: str  # wrappers around the UNet


def run_compiled(
    unet: nn.Module, run: Callable[..., Tensor], signature: Signature, obstacle: str | None
) -> Tensor:
    """Run a UNet that is compiled, entirely or in part.

    run: calls the UNet with additional keyword arguments. obstacle: the reason why it cannot run compiled.
    """
    if obstacle is None and not is_optimized(unet):
        obstacle = "its blocks are compiled one by one"
    if obstacle is None:
        split = _split.setdefault(unet._orig_mod, set())
        if signature.packs not in split:
            before = _frames()
            out = run(**{SIGNATURE: repr(signature)})
            if _is_one_graph(before):
                return out
            split.add(signature.packs)
            # The graphs are cached by code objects that UNets without references share, and have no guards to
            # distinguish them.
            torch.compiler.reset()
        obstacle = "it compiles into several graphs"
    warn_once(f"torch.compile is not used for this UNet while Apply EasyRef acts, because {obstacle}.")
    with _uncompiled:
        return run()


def guard_signature(signature: str | None) -> None:
    """Make torch.compile guard the value of the signature: called inside the UNet, dynamo guards a
    comparison.

    Raises ValueError where it is empty.
    """
    if signature == "":
        raise ValueError("The signature of the UNet call is empty; wanted the state of its injections.")


def _frames() -> tuple[int, int, int]:
    """Counts of the process: frames that dynamo began to compile, frames compiled, and graph breaks."""
    counters = sys.modules["torch._dynamo.utils"].counters
    frames = counters["frames"]
    return frames["total"], frames["ok"], sum(counters["graph_break"].values())


def _is_one_graph(before: tuple[int, int, int]) -> bool:
    """True if nothing was compiled since then, or one graph."""
    total, ok, breaks = (now - then for now, then in zip(_frames(), before, strict=True))
    return (total, ok, breaks) in ((0, 0, 0), (1, 1, 0))


class _Uncompiled:
    """Context in which nothing runs compiled.

    Reentrant and locked, because the stance is global and each device may run in its own thread.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._stance = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        if not hasattr(torch.compiler, "set_stance"):
            raise RuntimeError(
                f"Apply EasyRef cannot run this UNet without torch.compile in PyTorch {torch.__version__}; "
                "wanted 2.6 or newer. Update PyTorch, or remove the node that compiles the model."
            )
        with self._lock:
            if self._depth == 0:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._stance.close()


_uncompiled = _Uncompiled()
