"""Call of a replaced attention forward on queries, keys and values that are projected already.

NAG (arXiv 2505.21179) guides the text attention by a negative prompt: it appends that prompt's rows to the
context and sets its own forward on every attn2 module. ComfyUI does not call that forward where an attn2
patch is set, so the patch calls it here, without its projections.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from ...easyref_core.unet.layout import Site
from .step import STEP

if TYPE_CHECKING:
    from torch import Tensor, nn


def run_replaced_forward(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """The output (rows of q, tokens, inner) of the replaced forward of this site's attention, before
    `to_out`.

    Raises ValueError where the forward is not replaced, because then no known pack gives k and v other rows
    than q.
    """
    block, index = extra_options["block"], extra_options.get("block_index", 0)
    site = Site(block[0], block[1], index)
    step = extra_options.get(STEP)
    attention = step and step.unet.get_submodule(f"{site.comfy}.attn2")
    forward = attention and vars(attention).get("forward")
    if not isinstance(forward, MethodType):
        raise ValueError(
            f"The cross-attention {site.comfy}.attn2 was given {len(q)} rows of queries and {len(k)} rows "
            "of keys. The only pack known to do this, NAG, also replaces the attention's forward, which is "
            "not replaced here. Remove the pack that changes the context, or Apply EasyRef."
        )
    return forward.__func__(
        _WithoutProjections(attention), q, context=k, value=v, transformer_options=extra_options
    )


class _WithoutProjections:
    """Proxy of an attention module whose projections are the identity."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    @staticmethod
    def _identity(x: Tensor) -> Tensor:
        return x

    to_q = to_k = to_v = to_out = _identity
