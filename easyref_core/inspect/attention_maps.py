"""Attention maps of the reference tokens: the softmax weights of the MLLM's last layer, per reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat

from ..mllm.preprocess import resized_sides
from ..mllm.qwen2_vl import apply_rope
from ..utils.images import check_image

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from ..mllm.context import ContextStates
    from ..mllm.qwen2_vl import Rope, SelfAttention
    from ..model import EasyRef
    from ..tokens.aggregator import ReferenceAggregator


@dataclasses.dataclass(frozen=True)
class AttentionShares:
    """Shares of the reference tokens' attention, in 0..1; together they sum to 1.

    maps: one (rows, columns) map in image tokens per reference; its sum is the reference's share.
    template: chat template up to the last reference, including the image marks and the first tokens, which
    many heads use as an attention sink. text: everything after the last reference (instruction, prompt, end
    of the template). tokens: the reference tokens themselves.
    """

    maps: tuple[Tensor, ...]
    template: float
    text: float
    tokens: float

    @property
    def references(self) -> list[float]:
        """Share of each reference."""
        return [float(attention_map.sum()) for attention_map in self.maps]


@torch.inference_mode()
def attention_shares(model: EasyRef, context: ContextStates, token: int = -1) -> AttentionShares:
    """Return the attention shares of one reference token, or of all (token -1), averaged over heads.

    Raises ValueError for a context of another checkpoint and for a token that does not exist.
    """
    states, bias = model.aggregator_inputs(context)
    count = model.config.num_tokens
    if not -1 <= token < count:
        raise ValueError(
            f"Reference token {token} does not exist: the checkpoint has {count}, 0 to {count - 1}. "
            "Choose one of them, or -1 for all."
        )
    weights = aggregation_attention(model.mllm.aggregator, states, bias)
    per_token = weights[0].mean(dim=0).cpu()  # (T, S + T)
    return split_shares(per_token.mean(dim=0) if token < 0 else per_token[token], context)


def aggregation_attention(
    aggregator: ReferenceAggregator, context: Tensor, attn_bias: Tensor | None = None
) -> Tensor:
    """Return the attention (B, heads, T, S + T) of the reference tokens over context states (B, S, D).

    These are the last layer's softmax(Q K^T) at the reference tokens' rows, in float32; each row sums to 1.
    attn_bias: (T, S + T), see weight_bias.
    """
    config, last = aggregator.config, aggregator.layers[-1]
    x, rope = aggregator.last_layer_input(context, attn_bias=attn_bias)
    return attention_weights(
        last.self_attn,
        last.input_layernorm(x),
        rope,
        causal=config.causal,
        num_queries=config.num_tokens,
        attn_bias=attn_bias,
    )


def attention_weights(
    attention: SelfAttention,
    x: Tensor,
    rope: Rope,
    *,
    causal: bool,
    num_queries: int,
    attn_bias: Tensor | None = None,
) -> Tensor:
    """Return softmax(Q K^T / sqrt(head_dim)) of the last positions of x (B, S, D).

    The result is (B, heads, num_queries, S). attn_bias: (num_queries, S), added to the logits.
    """
    cos, sin = rope
    q = rearrange(attention.q_proj(x[:, -num_queries:]), "b n (h d) -> b n h d", h=attention.heads).float()
    k = rearrange(attention.k_proj(x), "b n (h d) -> b n h d", h=attention.kv_heads).float()
    q, k = apply_rope(q, (cos[-num_queries:], sin[-num_queries:])), apply_rope(k, rope)
    k = repeat(k, "b n h d -> b (h g) n d", g=attention.heads // attention.kv_heads)
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) / attention.head_dim**0.5
    scores = scores if attn_bias is None else scores + attn_bias.float()
    visible = torch.ones(num_queries, x.shape[1], dtype=torch.bool, device=x.device)
    if causal:
        visible = visible.tril(x.shape[1] - num_queries)
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)


def split_shares(weights: Tensor, context: ContextStates) -> AttentionShares:
    """Split attention weights (S + T,) into shares of the references, the text and the reference tokens."""
    length, last = context.states.shape[1], context.spans[-1][1]
    maps = tuple(
        weights[start:end].reshape(rows, columns)
        for (start, end), (rows, columns) in zip(context.spans, context.token_grids, strict=True)
    )
    template = weights[:last].sum() - sum(attention_map.sum() for attention_map in maps)
    return AttentionShares(
        maps, float(template), float(weights[last:length].sum()), float(weights[length:].sum())
    )


def require_same_group(
    images: Sequence[Image.Image | Tensor], context: ContextStates, config: EasyRefConfig
) -> None:
    """Raise ValueError for images that cannot be the references of a context, because their grids differ."""
    sizes = [check_image(image, f"image {i + 1}") for i, image in enumerate(images)]
    resized = [resized_sides(h, w, config, context.provenance.size)[-1] for w, h in sizes]
    patches = [(height // config.patch_size, width // config.patch_size) for height, width in resized]
    encoded = [tuple(sides) for sides in context.grid[:, 1:].tolist()]
    if patches != encoded:
        raise ValueError(
            f"The group is not the one that was encoded: it has {len(patches)} references of {patches} "
            f"patches, the context {len(encoded)} of {encoded}. Connect the same group to Encode Reference "
            "Group and here."
        )
