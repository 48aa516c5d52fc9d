"""Attention that another pack has put in the place of a module's own forward, run on queries, keys and
values.

NAG (arXiv 2505.21179) guides the text attention by a negative prompt: it appends that prompt's rows to the
context and sets a forward of its own on every attn2 module. ComfyUI does not come to that forward where an
attn2 patch is set; the patch runs it here, between the projections that have been made already.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from ...easyref_core.unet.layout import Site
from .injection import STEP

if TYPE_CHECKING:
    from torch import Tensor, nn


def run_replaced_forward(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """The output (rows of q, tokens, inner) of the forward that the attention of this site was given, before
    `to_out`.

    Raises ValueError where the attention has its own forward: nothing known makes k and v of other rows than
    q then.
    """
    block, index = extra_options["block"], extra_options.get("block_index", 0)
    site = Site(block[0], block[1], index)
    step = extra_options.get(STEP)
    attention = step and step.unet.get_submodule(f"{site.comfy}.attn2")
    forward = attention and vars(attention).get("forward")
    if not isinstance(forward, MethodType):
        raise ValueError(
            f"The cross-attention {site.comfy}.attn2 was given {len(q)} rows of queries and {len(k)} rows "
            "of keys. One pack is known to do this, NAG, and it sets a forward of its own on the "
            "attention, which is missing here. Remove the pack that changes the context, or Apply EasyRef."
        )
    return forward.__func__(
        _BetweenProjections(attention), q, context=k, value=v, transformer_options=extra_options
    )


class _BetweenProjections:
    """An attention module whose projections pass on what they are given."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    @staticmethod
    def _identity(x: Tensor) -> Tensor:
        return x

    to_q = to_k = to_v = to_out = _identity
