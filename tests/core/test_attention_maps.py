"""Attention maps, against the layer itself and against attention written out in float64."""

from __future__ import annotations

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.inspect.attention_maps import (
    AttentionShares,
    aggregation_attention,
    attention_shares,
    attention_weights,
)
from easyref_core.mllm.qwen2_vl import text_rope

from .by_hand import attend


@pytest.fixture(scope="module")
def inputs(model: er.EasyRef, context: er.ContextStates) -> torch.Tensor:
    """Input of the last layer's attention, (1, S + T, D)."""
    aggregator = model.mllm.aggregator
    x = torch.cat([context.states, aggregator.reference_tokens.weight[None]], dim=1)
    with torch.no_grad():
        return aggregator.layers[-1].input_layernorm(x)


def total(shares: AttentionShares) -> float:
    return sum(shares.references) + shares.template + shares.text + shares.tokens


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_weights_match_float64_and_give_the_layer_output(model, inputs, causal) -> None:
    attention, count = model.mllm.aggregator.layers[-1].self_attn, model.config.num_tokens
    rope = text_rope(inputs.shape[1], model.config, inputs.device)
    weights = attention_weights(attention, inputs, rope, causal=causal, num_queries=count)
    assert weights.dtype == torch.float32
    wanted, values = attend(attention, model.config, inputs, causal)
    assert golden.error(weights[0], wanted) <= golden.EXACT
    output = attention.o_proj(values.float())
    assert golden.error(attention(inputs, rope, causal, count), output) <= golden.EXACT


@torch.no_grad()
def test_aggregation_attention_is_causal_as_released(model, context, inputs) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)
    wanted, _ = attend(model.mllm.aggregator.layers[-1].self_attn, model.config, inputs)
    assert golden.error(weights[0], wanted) <= golden.EXACT


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
