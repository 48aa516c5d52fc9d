"""torch.compile around the UNet: exact under it, or run without it.

ComfyUI compiles with all guards on transformer_options dropped, so that a Python decision on anything in them
is frozen at the first trace, for later prompts of the process too. Therefore

- tensors in transformer_options (K and V with the weight in them, masks) may change from call to call;
- everything else that an attention decides by is told in a keyword argument of the UNet, `SIGNATURE`, whose
  guard is kept;
- outside its window an injection acts with V = 0, so that a step does not change the signature;
- where guards on transformer_options would have to tell one attention from another (blocks compiled one by
  one, a UNet that compiles into several graphs), the UNet runs uncompiled, and a warning says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import WrappersMP

from .log import warn_once

if TYPE_CHECKING:
    from torch import Tensor, nn

SIGNATURE = "easyref_signature"  # keyword argument of the UNet

# signatures that compile into several graphs
_split: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def is_compiled(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether the UNet of a model, or a part of it, is compiled in this call."""
    if is_optimized(model.diffusion_model):
        return True
    # a walk over all modules: only where something may have put compiled ones in their place
    others = len(options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})) > 1
    patched = getattr(model.current_patcher, "object_patches", {})
    if not others and not any(name.startswith("diffusion_model") for name in patched):
        return False
    return any(map(is_optimized, model.diffusion_model.modules()))


def is_optimized(module: nn.Module) -> bool:
    """Whether a module is one that torch.compile returned."""
    # torch._dynamo takes seconds to import; where it has not been, nothing is compiled
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def run_compiled(unet: nn.Module, run: Callable[..., Tensor], signature: str, obstacle: str | None) -> Tensor:
    """Run a UNet that is compiled, or of which parts are.

    run: calls the UNet, with keyword arguments for it. signature: all that the attentions decide by, except
    tensors. obstacle: why it cannot run compiled, if there is a reason.
    """
    if obstacle is None and not is_optimized(unet):
        obstacle = "its blocks are compiled one by one"
    if obstacle is None:
        split = _split.setdefault(unet._orig_mod, set())
        if signature not in split:
            before = _frames()
            out = run(**{SIGNATURE: signature})
            if _is_one_graph(before):
                return out
            split.add(signature)
        obstacle = "it compiles into several graphs"
    warn_once(f"torch.compile is not used for this UNet while Apply EasyRef acts, because {obstacle}.")
    with _uncompiled():
        return run()


def guard_signature(signature: str | None) -> None:
    """Have torch.compile guard the value of the signature. Called inside the UNet: dynamo guards what is
    compared.

    Raises ValueError where it is empty.
    """
    if signature == "":
        raise ValueError("The signature of the UNet call is empty; wanted the state of its injections.")


def _frames() -> tuple[int, int, int]:
    """Frames that were compiled, frames for which that went well, and graph breaks, since the process
    began.
    """
    counters = sys.modules["torch._dynamo.utils"].counters
    frames = counters["frames"]
    return frames["total"], frames["ok"], sum(counters["graph_break"].values())


def _is_one_graph(before: tuple[int, int, int]) -> bool:
    """Whether what was compiled since then, if anything, is one whole graph."""
    total, ok, breaks = (now - then for now, then in zip(_frames(), before, strict=True))
    return (total, ok, breaks) in ((0, 0, 0), (1, 1, 0))


@contextmanager
def _uncompiled() -> Iterator[None]:
    if not hasattr(torch.compiler, "set_stance"):
        raise RuntimeError(
            f"Apply EasyRef cannot run this UNet without torch.compile in PyTorch {torch.__version__}; "
            "wanted 2.6 or newer. Update PyTorch, or remove the node that compiles the model."
        )
    with torch.compiler.set_stance("force_eager"):
        yield
