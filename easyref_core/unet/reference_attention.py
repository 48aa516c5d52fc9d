"""Decoupled cross-attention: the UNet attends to the reference tokens beside the text (IP-Adapter, arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

# Keys and values of the reference tokens at one site, each (rows, T, inner).
KeyValue = tuple["Tensor", "Tensor"]

# How the weight enters the attention to the reference tokens, as IPAdapter_plus names it.
SCALINGS = ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty")


class KVProjections(nn.Module):
    """The checkpoint's to_k_ip and to_v_ip of every cross-attention site, in the order of the layout."""

    def __init__(self, inner: Sequence[int], token_width: int, operations: Any = nn, **factory: Any) -> None:
        """inner: width of each site's attention (640 or 1280 in SDXL)."""
        super().__init__()

        def linears() -> nn.ModuleList:
            return nn.ModuleList(
                operations.Linear(token_width, width, bias=False, **factory) for width in inner
            )

        self.to_k_ip, self.to_v_ip = linears(), linears()

    def forward(self, tokens: Tensor) -> list[KeyValue]:
        """tokens (rows, T, C) -> per site K and V (rows, T, inner)."""
        return [(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k_ip, self.to_v_ip, strict=True)]


def require_finite(key_values: Sequence[KeyValue], computed_in: torch.dtype) -> None:
    """Raises ValueError where one of these is NaN or infinite, which would show as a black picture."""
    finite = torch.stack([torch.isfinite(part).all() for pair in key_values for part in pair])
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of the {len(finite)} keys and values are not finite (computed in {computed_in}): "
            "the checkpoint's to_k_ip and to_v_ip are damaged, or the tokens are. Download the checkpoint again."
        )


def reference_attention(q: Tensor, key_value: KeyValue, heads: int, real: Tensor | None = None) -> Tensor:
    """The reference term, softmax(Q K^T) V, to be added to the text's attention before the output projection.

    q: (batch, tokens, inner), the query the text attention uses too (LoRA included). key_value: rows (chunks, T, inner)
    where the batch is `chunks` equal runs of rows that share their references; the runs become longer sequences
    (a view), so nothing is repeated along the batch. The weight is in V, see `scaled`. real: (chunks, T), False at tokens
    that only fill up a shorter row. -> (batch, tokens, inner), in q's dtype, memory of its own.
    """
    # plain views: this runs 70 times a step, and parsing einops' patterns would take longer than a GPU's kernels
    # -> (chunks, batch / chunks * tokens, inner); raises where the batch is no multiple of the chunks
    queries = q.unflatten(0, (len(key_value[0]), -1)).flatten(1, 2)
    per_head = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, *key_value))
    mask = None if real is None else real[:, None, None]
    term = scaled_dot_product_attention(*per_head, attn_mask=mask)
    return term.transpose(1, 2).reshape(q.shape)


def require_scaling(scaling: str) -> None:
    """Raises ValueError for an unknown one."""
    if scaling not in SCALINGS:
        raise ValueError(f"There is no embeds_scaling {scaling!r}. Choose one of: {', '.join(SCALINGS)}.")


def apply_weight(key_value: KeyValue, weight: float, scaling: str = SCALINGS[0], widest: int = 0) -> KeyValue:
    """K and V (rows, T, inner) with the weight in them, so that no layer of no step multiplies its term by it.

    "V only" is the term times the weight; "K+V" makes the attention itself sharper with the weight; "C penalty" weakens narrow layers, by inner / widest
    (widest: inner width of the widest attention of the UNet, 1280 in SDXL); "mean(V)" scales only what all tokens' V
    share.
    """
    k, v = key_value
    if scaling == SCALINGS[0]:
        return k, v if weight == 1 else v * weight
    if "penalty" in scaling:
        weight = weight * (k.shape[-1] / widest)
    if "mean" in scaling:
        return k * weight, v + (weight - 1) * v.mean(dim=1, keepdim=True)
    return k * weight, v * weight
