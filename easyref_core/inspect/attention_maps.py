"""What the reference tokens read: the attention of the MLLM's last layer, computed once more to be looked at."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat

from ..mllm.qwen2_vl import apply_rope
from ..tokens.aggregator import weight_bias

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from ..mllm.context import ContextStates
    from ..mllm.qwen2_vl import Rope, SelfAttention
    from ..model import EasyRef
    from ..tokens.aggregator import ReferenceAggregator


@dataclasses.dataclass(frozen=True)
class AttentionShares:
    """Where the attention of the reference tokens goes; all shares together are 1."""

    # per reference (rows, columns) in image tokens; the sum of a map is the reference's share
    maps: tuple[Tensor, ...]
    template: (
        float  # the chat template up to the last reference: the marks, and the start that many heads rest on
    )
    text: float  # what follows the last reference: instruction, prompt and the template's end
    tokens: float  # the reference tokens themselves

    @property
    def references(self) -> list[float]:
        """Each reference's share."""
        return [float(part.sum()) for part in self.maps]


@torch.inference_mode()
def read_shares(model: EasyRef, context: ContextStates, token: int = -1) -> AttentionShares:
    """The attention of one reference token, or of all (token -1), averaged over tokens and heads.

    Raises ValueError for a context of another checkpoint and for a token there is not.
    """
    model.require_same_checkpoint(context, "context")
    count = model.config.num_tokens
    if not -1 <= token < count:
        raise ValueError(
            f"Reference token {token} does not exist: the checkpoint has {count}, 0 to {count - 1}. "
            "Choose one of them, or -1 for all."
        )
    bias = weight_bias(context, count)
    bias = None if bias is None else bias.to(model.device, model.dtype)
    states = context.states.to(model.device, model.dtype)
    weights = aggregation_attention(model.mllm.aggregator, states, bias)
    of_tokens = weights[0].mean(dim=0).cpu()  # -> (T, S + T)
    return split_shares(of_tokens.mean(dim=0) if token < 0 else of_tokens[token], context, model.config)


def aggregation_attention(
    aggregator: ReferenceAggregator, context: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Context states (B, S, D) -> how much each reference token attends to each position, (B, heads, T, S + T).

    The last layer's softmax(Q K^T) at the reference tokens' rows, in float32; each row's sum is 1. Layers before the
    last run as in ReferenceAggregator.gather. bias: (T, S + T), see weight_bias.
    """
    config, last = aggregator.config, aggregator.layers[-1]
    x, rope = aggregator.last_layer_input(context, attn_bias=bias)
    x = last.input_layernorm(x)
    return attention_weights(last.self_attn, x, rope, config.causal, config.num_tokens, bias=bias)


def attention_weights(
    attention: SelfAttention,
    x: Tensor,
    turn: Rope,
    causal: bool,
    queries: int,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(head_dim)) of the last `queries` positions of x (B, S, D) -> (B, heads, queries, S).

    bias: (queries, S), added to the logits.
    """
    cos, sin = turn
    q = rearrange(attention.q_proj(x[:, -queries:]), "b n (h d) -> b n h d", h=attention.heads).float()
    k = rearrange(attention.k_proj(x), "b n (h d) -> b n h d", h=attention.kv_heads).float()
    q, k = apply_rope(q, (cos[-queries:], sin[-queries:])), apply_rope(k, turn)
    k = repeat(k, "b n h d -> b (h g) n d", g=attention.heads // attention.kv_heads)
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) / attention.head_dim**0.5
    scores = scores if bias is None else scores + bias.float()
    seen = torch.ones(queries, x.shape[1], dtype=torch.bool, device=x.device)
    if causal:
        seen = seen.tril(x.shape[1] - queries)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def split_shares(weights: Tensor, context: ContextStates, config: EasyRefConfig) -> AttentionShares:
    """Attention (S + T,) to every position -> what of it goes to each reference, the text and the reference tokens."""
    length, last = context.states.shape[1], context.spans[-1][1]
    sizes = (context.grid[:, 1:] // config.merge_size).tolist()
    maps = tuple(
        weights[start:end].reshape(rows, columns)
        for (start, end), (rows, columns) in zip(context.spans, sizes, strict=True)
    )
    template = weights[:last].sum() - sum(part.sum() for part in maps)
    return AttentionShares(
        maps, float(template), float(weights[last:length].sum()), float(weights[length:].sum())
    )
