"""The last layer in float64: its self-attention, one query after another, and the reference tokens."""

from __future__ import annotations

import math

import torch

from easyref_core.mllm.config import EasyRefConfig
from easyref_core.mllm.qwen2_vl import SelfAttention
from easyref_core.tokens.aggregator import ReferenceAggregator


@torch.no_grad()
def attend(
    attention: SelfAttention,
    config: EasyRefConfig,
    x: torch.Tensor,
    causal: bool = True,
    factor: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (heads, T, S + T) and values (1, T, heads * d) of the last T positions of x (1, S + T, D).

    factor: (S + T,), which multiplies the exponential of each key.
    """
    x, length, dim = x[0].double(), x.shape[1], config.head_dim

    def project(linear: torch.nn.Linear) -> torch.Tensor:
        return (x @ linear.weight.double().T + linear.bias.double()).reshape(length, -1, dim)

    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.arange(length).double()[:, None, None] * frequencies

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    q, k, v = rotate(project(attention.q_proj)), rotate(project(attention.k_proj)), project(attention.v_proj)
    group, first = config.heads // config.kv_heads, length - config.num_tokens
    weights = torch.zeros(config.heads, config.num_tokens, length, dtype=torch.float64)
    values = torch.zeros(config.num_tokens, config.heads, dim, dtype=torch.float64)
    for head in range(config.heads):
        for token in range(config.num_tokens):
            scores = k[:, head // group] @ q[first + token, head] / math.sqrt(dim)
            scores[first + token + 1 :] = -torch.inf if causal else scores[first + token + 1 :]
            exponential = (scores - scores.max()).exp() * factor
            weights[head, token] = exponential / exponential.sum()
            values[token, head] = weights[head, token] @ v[:, head // group]
    return weights, values.flatten(1)[None]


@torch.no_grad()
def gather(
    aggregator: ReferenceAggregator, config: EasyRefConfig, states: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Reference tokens before the projector from context states (1, S, D), by an aggregator in float64.

    factor: see `attend`.
    """
    layer = aggregator.layers[-1]
    x = torch.cat([states.double(), aggregator.reference_tokens.weight[None]], dim=1)
    _, values = attend(layer.self_attn, config, layer.input_layernorm(x), factor=factor)
    attended = x[:, -config.num_tokens :] + layer.self_attn.o_proj(values)
    return aggregator.norm(attended + layer.mlp(layer.post_attention_layernorm(attended)))
