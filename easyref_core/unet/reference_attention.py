"""Decoupled cross-attention to reference tokens (IP-Adapter, arXiv 2308.06721): K/V projections, scalings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

# Keys and values of the reference tokens at one site, each (rows, T, inner).
KeyValue = tuple["Tensor", "Tensor"]


class KVProjections(nn.Module):
    """The checkpoint's to_k_ip and to_v_ip of each cross-attention site, in processor order."""

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
    """Raises ValueError if a key or value is NaN or infinite, which would show as a black image."""
    finite = torch.stack([torch.isfinite(tensor).all() for pair in key_values for tensor in pair])
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of the {len(finite)} keys and values are not finite (computed in "
            f"{computed_in}): the checkpoint's to_k_ip and to_v_ip are damaged, or the tokens are. Download "
            "the checkpoint again."
        )


def reference_attention(
    q: Tensor, key_value: KeyValue, heads: int, padding_mask: Tensor | None = None
) -> Tensor:
    """Attention to the references softmax(Q K^T) V of weighted K and V: the term added to the text attention.

    q: (batch, tokens, inner), the query that the text attention uses too (LoRA included). key_value: (runs,
    T, inner), weighted by apply_weight; the batch is `runs` equal runs of rows that share their references. A
    run becomes one longer sequence (a view), so nothing is repeated along the batch. padding_mask: (runs, T),
    False at padding. -> (batch, tokens, inner) in q's dtype, in new memory.
    """
    # Views instead of einops: this runs 70 times a step, and parsing patterns would take longer than a GPU's
    # kernels.
    # -> (runs, batch / runs * tokens, inner); raises if the batch is not a multiple of the runs
    queries = q.unflatten(0, (len(key_value[0]), -1)).flatten(1, 2)
    per_head = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, *key_value))
    mask = None if padding_mask is None else padding_mask[:, None, None]
    term = scaled_dot_product_attention(*per_head, attn_mask=mask)
    return term.transpose(1, 2).reshape(q.shape)


def _scale_v(k: Tensor, v: Tensor, weight: float, _: int) -> KeyValue:
    return k, v if weight == 1 else v * weight


def _scale_kv(k: Tensor, v: Tensor, weight: float, _: int) -> KeyValue:
    return k * weight, v * weight


def _scale_kv_by_width(k: Tensor, v: Tensor, weight: float, widest: int) -> KeyValue:
    weight = weight * (k.shape[-1] / widest)
    return k * weight, v * weight


def _scale_k_and_mean_v_by_width(k: Tensor, v: Tensor, weight: float, widest: int) -> KeyValue:
    weight = weight * (k.shape[-1] / widest)
    return k * weight, v + (weight - 1) * v.mean(dim=1, keepdim=True)


V_ONLY = "V only"
# How the weight enters K and V, by IPAdapter_plus' names: (K, V, weight, widest) -> K and V.
SCALINGS: dict[str, Callable[[Tensor, Tensor, float, int], KeyValue]] = {
    V_ONLY: _scale_v,
    "K+V": _scale_kv,
    "K+V w/ C penalty": _scale_kv_by_width,
    "K+mean(V) w/ C penalty": _scale_k_and_mean_v_by_width,
}


def require_scaling(scaling: str) -> None:
    """Raises ValueError if `scaling` is not one of SCALINGS."""
    if scaling not in SCALINGS:
        raise ValueError(f"embeds_scaling is {scaling!r}; wanted one of: {', '.join(SCALINGS)}.")


def apply_weight(key_value: KeyValue, weight: float, scaling: str = V_ONLY, widest: int = 0) -> KeyValue:
    """K and V (rows, T, inner) pre-multiplied by the weight, so it is not applied again at every step.

    "V only" is the term times the weight; "K+V" also makes the attention sharper with the weight; "C penalty"
    weakens narrow layers, by inner / widest (widest: inner width of the UNet's widest attention, 1280 in
    SDXL); "mean(V)" scales only the mean of V over the tokens.
    """
    return SCALINGS[scaling](*key_value, weight, widest)
