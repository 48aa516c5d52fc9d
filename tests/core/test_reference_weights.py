"""Weights of references in the aggregation: 1 is bit-identical, 0 is attention without its image tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, error
from easyref_core.mllm.qwen2_vl import attention_mask, text_rope
from easyref_core.tokens.aggregator import ReferenceAggregator, weight_bias

from .by_hand import gather
from .errors import assert_says, error_of


@torch.inference_mode()
@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 0, 0.5), (4, 1, 0.25), (0, 0, 0)])
def test_attention_matches_the_one_computed_by_hand(
    context: er.ContextStates, weights: tuple[float, ...]
) -> None:
    fresh = er.load(golden.CHECKPOINT, golden.MLLM)  # because its aggregator is changed
    aggregator, tokens = fresh.mllm.aggregator.double(), fresh.config.num_tokens
    bias = weight_bias(context.weighed(weights), tokens).double()
    factor = torch.ones(context.states.shape[1] + tokens)
    for (start, end), weight in zip(context.spans, weights, strict=True):
        factor[start:end] = weight

    wanted = gather(aggregator, fresh.config, context.states, factor)
    found = aggregator.gather(context.states.double(), attn_bias=bias)
    assert error(found, wanted) <= 1e-6  # RoPE is in float32


def test_weights_of_1_are_bit_identical(model: er.EasyRef, context: er.ContextStates) -> None:
    assert context.weighed([1, 1.0, 1]).weights is None
    found = model.aggregate(context.weighed([0.5, 1, 2]).weighed([1, 1, 1]))
    assert torch.equal(found.as_subclass(torch.Tensor), model.aggregate(context).as_subclass(torch.Tensor))


def test_weight_changes_the_tokens_and_not_the_context(model: er.EasyRef, context: er.ContextStates) -> None:
    weighed = context.weighed([1, 0, 1])
    assert weighed.states is context.states
    assert context.weights is None
    assert error(model.aggregate(weighed), model.aggregate(context)) > 0.001


def test_reference_of_weight_0_is_ignored(model: er.EasyRef, context: er.ContextStates) -> None:
    start, end = context.spans[1]
    states = context.states.clone()
    states[:, start:end] = torch.randn_like(states[:, start:end])
    other = dataclasses.replace(context, states=states)
    found, wanted = (model.aggregate(c.weighed([1, 0, 1])) for c in (other, context))
    assert error(found, wanted) <= EXACT


def test_all_weights_0_is_finite(model: er.EasyRef, context: er.ContextStates) -> None:
    assert torch.isfinite(model.aggregate(context.weighed([0, 0, 0]))).all()


@torch.inference_mode()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_weights_do_not_change_the_context_in_any_final_layer(model: er.EasyRef, causal: bool) -> None:
    """A weight acts in every final layer, on the attention of the reference tokens and not of the context."""
    config = dataclasses.replace(model.config, final_layers=2, causal=causal)
    torch.manual_seed(0)
    aggregator = ReferenceAggregator(config)
    for parameter in aggregator.parameters():
        parameter.normal_(std=0.2)
    length, tokens = 20, config.num_tokens
    x = torch.randn(1, length + tokens, config.hidden_size)
    factor = torch.ones(length + tokens)
    factor[3:9] = 0
    bias = factor.log().expand(tokens, -1)
    rope = text_rope(length + tokens, config, x.device)
    layer = aggregator.layers[0]
    weighed, plain = (layer(x, rope, causal=causal, attn_bias=given) for given in (bias, None))
    assert error(weighed[:, :length], plain[:, :length]) <= EXACT
    assert error(weighed[:, length:], plain[:, length:]) > 0.001
    assert torch.isfinite(aggregator(x[:, :length], attn_bias=bias)).all()


@torch.inference_mode()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_padding_does_not_change_a_weighed_row(model: er.EasyRef, causal: bool) -> None:
    aggregator = ReferenceAggregator(dataclasses.replace(model.config, causal=causal))
    aggregator.load_state_dict(model.mllm.aggregator.state_dict())
    tokens, padding = model.config.num_tokens, 5
    states = torch.randn(1, 30, model.config.hidden_size)
    factor = torch.ones(30 + tokens)
    factor[4:12] = 0.3
    factor[12:20] = 0
    wanted = aggregator(states, attn_bias=factor.log().expand(tokens, -1))
    padded = torch.cat([torch.randn(1, padding, states.shape[-1]), states], dim=1)
    padding_mask = torch.arange(30 + padding)[None] >= padding
    bias = torch.cat([torch.ones(padding), factor]).log().expand(tokens, -1)
    assert error(aggregator(padded, padding_mask, bias), wanted) <= EXACT


def test_no_mask_without_weights() -> None:
    assert attention_mask(7, 7, True, None, torch.device("cpu")) is None


def test_mask_with_a_bias_is_causal() -> None:
    mask = attention_mask(4, 4, True, None, torch.device("cpu"), attn_bias=torch.zeros(2, 4))
    assert torch.equal(mask == 0, torch.ones(4, 4, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1, 1], ["2 weights for 3 references", "one for each"]),
        ([1, -0.5, 1], ["reference 2 is -0.5", "wanted 0", "to 4"]),
        ([1, 1, 5], ["reference 3 is 5", "to 4"]),
        ([float("nan"), 1, 1], ["reference 1 is nan"]),
    ],
)
def test_invalid_weights_are_refused(context: er.ContextStates, weights: list, parts: list[str]) -> None:
    assert_says(error_of(lambda: context.weighed(weights)), *parts)
