"""Attention maps, against the layer itself and against attention written out in float64."""

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
    attention_shares,
    attention_weights,
)
from easyref_core.mllm.qwen2_vl import text_rope


@pytest.fixture(scope="module")
def context(model: er.EasyRef) -> er.ContextStates:
    return model.encode(golden.references(), golden.PROMPT, size=golden.SIZE)


@pytest.fixture(scope="module")
def inputs(model: er.EasyRef, context: er.ContextStates) -> torch.Tensor:
    """Input of the last layer's attention, (1, S + T, D)."""
    aggregator = model.mllm.aggregator
    x = torch.cat([context.states, aggregator.reference_tokens.weight[None]], dim=1)
    with torch.no_grad():
        return aggregator.layers[-1].input_layernorm(x)


def total(shares: AttentionShares) -> float:
    return sum(shares.references) + shares.template + shares.text + shares.tokens


def in_float64(model: er.EasyRef, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention (heads, T, S + T) in float64, one query after another."""
    attention, config = model.mllm.aggregator.layers[-1].self_attn, model.config
    x, length, dim = x[0].double(), x.shape[1], config.head_dim

    def project(linear: torch.nn.Linear) -> torch.Tensor:
        return (x @ linear.weight.double().T + linear.bias.double()).reshape(length, -1, dim)

    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.arange(length).double()[:, None, None] * frequencies

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    q, k = rotate(project(attention.q_proj)), rotate(project(attention.k_proj))
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
def test_weights_match_float64_and_give_the_layer_output(model, inputs, causal) -> None:
    attention, count = model.mllm.aggregator.layers[-1].self_attn, model.config.num_tokens
    rope = text_rope(inputs.shape[1], model.config, inputs.device)
    weights = attention_weights(attention, inputs, rope, causal=causal, num_queries=count)
    assert weights.dtype == torch.float32
    assert golden.error(weights[0], in_float64(model, inputs, causal)) <= golden.EXACT

    v = rearrange(attention.v_proj(inputs), "b n (h d) -> b h n d", h=attention.kv_heads)
    v = v.repeat_interleave(attention.heads // attention.kv_heads, dim=1)
    output = attention.o_proj(rearrange(weights @ v, "b h n d -> b n (h d)"))
    assert golden.error(output, attention(inputs, rope, causal, count)) <= golden.EXACT


@torch.no_grad()
def test_aggregation_attention_is_causal_as_released(model, context, inputs) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)
    assert golden.error(weights[0], in_float64(model, inputs, True)) <= golden.EXACT


def test_shares_are_positive_and_sum_to_1(model, context) -> None:
    shares = attention_shares(model, context)
    assert total(shares) == pytest.approx(1, abs=1e-5)
    assert min(*shares.references, shares.template, shares.text, shares.tokens) > 0


def test_reference_weights_change_the_shares(model, context) -> None:
    plain = attention_shares(model, context).references
    weights = [0.0, 4.0, *[1.0] * (len(context.spans) - 2)]
    weighed = attention_shares(model, context.weighed(weights)).references
    assert weighed[0] == 0
    assert weighed[1] > plain[1]


def test_maps_hold_the_weights_of_the_image_tokens(model, context) -> None:
    maps = attention_shares(model, context).maps
    merged = context.grid[:, 1:] // model.config.merge_size
    assert [list(attention_map.shape) for attention_map in maps] == merged.tolist()
    weights = aggregation_attention(model.mllm.aggregator, context.states)[0].mean(dim=(0, 1))
    for attention_map, (start, end) in zip(maps, context.spans, strict=True):
        assert torch.allclose(attention_map.flatten(), weights[start:end])


@torch.no_grad()
def test_first_token_attends_only_to_itself_among_tokens(model, context) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)[0, :, 0]
    assert attention_shares(model, context, 0).tokens == pytest.approx(
        float(weights[:, context.states.shape[1]].mean()), rel=1e-5
    )


def test_all_tokens_are_the_mean_of_single_tokens(model, context) -> None:
    each = [attention_shares(model, context, token).text for token in range(model.config.num_tokens)]
    assert attention_shares(model, context).text == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("token", [-2, 10**6])
def test_missing_token_is_refused(model, context, token) -> None:
    with pytest.raises(ValueError, match=f"Reference token {token} does not exist"):
        attention_shares(model, context, token)


def test_bfloat16_model(context) -> None:
    model = er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.bfloat16)
    shares = attention_shares(model, context)
    assert shares.maps[0].dtype == torch.float32
    assert total(shares) == pytest.approx(1, abs=1e-5)
