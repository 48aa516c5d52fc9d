"""The reference term written out by hand, as the expected result of Apply EasyRef."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from devkit.host.sampling import Easy


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    return optimized_attention(q, k, v, extra_options["n_heads"])


def by_hand(
    easy: Easy,
    model: ModelPatcher,
    weight: float | Callable[[Tensor], Tensor] = 1.0,
    foreign: Callable[..., Tensor] = text_attention,
    runs: tuple[int, ...] = (0, 1),
) -> ModelPatcher:
    """The model with the LoRA and, at every site, `foreign` plus weight * softmax(Q K^T / sqrt(d)) V.

    weight: a number, or a function of the queries. runs: row of K and V of each half of the batch; 0 is the
    unconditional one.
    """

    def at_site(key: Tensor, value: Tensor) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
            heads, parts = extra_options["n_heads"], []
            for row, queries in zip(runs, q.chunk(len(runs)), strict=True):
                qkv = (queries, key[row].to(q), value[row].to(q))
                split = [t.unflatten(-1, (heads, -1)).movedim(-2, -3) for t in qkv]
                scores = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
                parts.append((scores.softmax(-1) @ split[2]).movedim(-3, -2).flatten(-2))
            factor = weight(q) if callable(weight) else weight
            return foreign(q, k, v, extra_options) + factor * torch.cat(parts)

        return attention

    patched = easy.apply(model, weight=0.0)
    for site, (key, value) in zip(easy.easyref.model.checkpoint.sites, easy.key_values, strict=True):
        patched.set_model_attn2_replace(at_site(key, value), *site)
    return patched
