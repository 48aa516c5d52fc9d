"""Attention of the reference tokens, compared with the layer itself and with attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange

import easyref_core as er
from devkit import golden
from easyref_core.inspect.attention_maps import (
    AttentionShares,
    aggregation_attention,
    attention_weights,
    read_shares,
)
from easyref_core.mllm.qwen2_vl import Rope


@pytest.fixture(scope="module")
def context(model: er.EasyRef) -> er.ContextStates:
    return model.encode(golden.references(), golden.PROMPT, size=golden.SIZE)


@pytest.fixture(scope="module")
def layer_input(model: er.EasyRef, context: er.ContextStates) -> tuple[torch.Tensor, Rope]:
    """Input of the last layer's attention, (1, S + T, D), and its RoPE."""
    with torch.no_grad():
        x, rope = model.mllm.aggregator.last_layer_input(context.states)
        return model.mllm.aggregator.layers[-1].input_layernorm(x), rope


def by_hand(model: er.EasyRef, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention (heads, T, S + T) in float64, one query after another."""
    attention, config = model.mllm.aggregator.layers[-1].self_attn, model.config
    x, length, dim = x[0].double(), x.shape[1], config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.arange(length).double()[:, None, None] * frequencies

    def rotated(linear: torch.nn.Linear) -> torch.Tensor:
        y = (x @ linear.weight.double().T + linear.bias.double()).reshape(length, -1, dim)
        a, b = y[..., : dim // 2], y[..., dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    q, k = rotated(attention.q_proj), rotated(attention.k_proj)
    group = config.heads // config.kv_heads
    rows = torch.zeros(config.heads, config.num_tokens, length, dtype=torch.float64)
    for head in range(config.heads):
        for token in range(config.num_tokens):
            position = length - config.num_tokens + token
            scores = k[:, head // group] @ q[position, head] / math.sqrt(dim)
            scores[position + 1 :] = -torch.inf if causal else scores[position + 1 :]
            rows[head, token] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    return rows


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_weights_are_those_of_the_layer(model, layer_input, causal: bool) -> None:
    """They equal attention by hand, and their product with the values is the layer's output."""
    (x, rope), attention = layer_input, model.mllm.aggregator.layers[-1].self_attn
    count = model.config.num_tokens
    weights = attention_weights(attention, x, rope, causal, count)
    assert weights.dtype == torch.float32
    assert golden.error(weights[0], by_hand(model, x, causal)) <= golden.EXACT
    v = rearrange(attention.v_proj(x), "b n (h d) -> b h n d", h=attention.kv_heads)
    v = v.repeat_interleave(attention.heads // attention.kv_heads, dim=1)
    output = attention.o_proj(rearrange(weights @ v, "b h n d -> b n (h d)"))
    assert golden.error(output, attention(x, rope, causal, count)) <= golden.EXACT


@torch.no_grad()
def test_aggregation_attention_is_causal_as_the_model(model, context, layer_input) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)
    assert golden.error(weights[0], by_hand(model, layer_input[0], True)) <= golden.EXACT


def assert_sums_to_1(shares: AttentionShares) -> None:
    values = *shares.references, shares.template, shares.text, shares.tokens
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert min(values) > 0


def test_shares_sum_to_1(model, context) -> None:
    assert_sums_to_1(read_shares(model, context))


def test_shares_of_a_bfloat16_model(context) -> None:
    shares = read_shares(er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.bfloat16), context)
    assert shares.maps[0].dtype == torch.float32
    assert_sums_to_1(shares)


def test_weights_of_references_change_their_shares(model, context) -> None:
    plain = read_shares(model, context).references
    weights = [0.0, 4.0, *[1.0] * (len(context.spans) - 2)]
    weighted = read_shares(model, context.weighed(weights)).references
    assert weighted[0] == 0
    assert weighted[1] > plain[1]


def test_maps_are_the_attention_at_the_image_tokens(model, context) -> None:
    maps = read_shares(model, context).maps
    merged = context.grid[:, 1:] // model.config.merge_size
    assert [list(one.shape) for one in maps] == merged.tolist()
    weights = aggregation_attention(model.mllm.aggregator, context.states)[0].mean(dim=(0, 1))
    for one, (start, end) in zip(maps, context.spans, strict=True):
        assert torch.allclose(one.flatten(), weights[start:end])


@torch.no_grad()
def test_the_first_token_attends_to_no_other_token(model, context) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)[0, :, 0]
    itself = float(weights[:, context.states.shape[1]].mean())
    assert read_shares(model, context, 0).tokens == pytest.approx(itself, rel=1e-5)


def test_pooled_is_the_mean_over_tokens(model, context) -> None:
    each = [read_shares(model, context, token).text for token in range(model.config.num_tokens)]
    assert read_shares(model, context).text == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("token", [-2, 10**6])
def test_a_token_that_does_not_exist(model, context, token: int) -> None:
    with pytest.raises(ValueError, match=f"Reference token {token} does not exist"):
        read_shares(model, context, token)
