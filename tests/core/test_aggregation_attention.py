"""What the reference tokens read, against the layer itself and against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange

import easyref_core as er
from devkit import golden
from easyref_core.inspect.attention_maps import aggregation_attention, attention_weights, read_shares
from easyref_core.mllm.qwen2_vl import text_rope


@pytest.fixture(scope="module")
def context(model: er.EasyRef) -> er.ContextStates:
    return model.encode(golden.references(), golden.PROMPT, size=golden.SIZE)


def layer_input(model: er.EasyRef, context: er.ContextStates) -> torch.Tensor:
    """What the last layer's attention reads, (1, S + T, D)."""
    aggregator = model.mllm.aggregator
    x = torch.cat([context.states, aggregator.reference_tokens.weight[None]], dim=1)
    return aggregator.layers[-1].input_layernorm(x)


def by_hand(model: er.EasyRef, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention (heads, T, S + T) in float64, one query after another."""
    attention, config = model.mllm.aggregator.layers[-1].self_attn, model.config
    x, length, dim = x[0].double(), x.shape[1], config.head_dim

    def project(linear: torch.nn.Linear) -> torch.Tensor:
        return (x @ linear.weight.double().T + linear.bias.double()).reshape(length, -1, dim)

    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.arange(length).double()[:, None, None] * frequencies

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    q, k = turned(project(attention.q_proj)), turned(project(attention.k_proj))
    group = config.heads // config.kv_heads
    rows = torch.zeros(config.heads, config.num_tokens, length, dtype=torch.float64)
    for head in range(config.heads):
        for token in range(config.num_tokens):
            place = length - config.num_tokens + token
            scores = k[:, head // group] @ q[place, head] / math.sqrt(dim)
            scores[place + 1 :] = -torch.inf if causal else scores[place + 1 :]
            rows[head, token] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    return rows


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_weights_are_attention_written_out(model, context, causal) -> None:
    x, attention = layer_input(model, context), model.mllm.aggregator.layers[-1].self_attn
    turn = text_rope(x.shape[1], model.config, x.device)
    found = attention_weights(attention, x, turn, causal, model.config.num_tokens)
    assert found.dtype == torch.float32
    assert golden.error(found[0], by_hand(model, x, causal)) <= golden.EXACT


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_weights_times_values_are_the_layer_output(model, context, causal) -> None:
    x, attention = layer_input(model, context), model.mllm.aggregator.layers[-1].self_attn
    turn, count = text_rope(x.shape[1], model.config, x.device), model.config.num_tokens
    weights = attention_weights(attention, x, turn, causal, count)
    v = rearrange(attention.v_proj(x), "b n (h d) -> b h n d", h=attention.kv_heads)
    v = v.repeat_interleave(attention.heads // attention.kv_heads, dim=1)
    found = attention.o_proj(rearrange(weights @ v, "b h n d -> b n (h d)"))
    assert golden.error(found, attention(x, turn, causal, count, None, None)) <= golden.EXACT


@torch.no_grad()
def test_aggregator_is_given_as_it_stands(model, context) -> None:
    found = aggregation_attention(model.mllm.aggregator, context.states)
    assert golden.error(found[0], by_hand(model, layer_input(model, context), True)) <= golden.EXACT


def test_shares_are_the_whole(model, context) -> None:
    shares = read_shares(model, context)
    assert sum(shares.references) + shares.template + shares.text + shares.tokens == pytest.approx(
        1, abs=1e-5
    )
    assert min(*shares.references, shares.template, shares.text, shares.tokens) > 0


def test_weights_of_references_show(model, context) -> None:
    plain = read_shares(model, context).references
    weights = [0.0, 4.0, *[1.0] * (len(context.spans) - 2)]
    weighed = read_shares(model, context.weighed(weights)).references
    assert weighed[0] == 0
    assert weighed[1] > plain[1]


def test_maps_have_the_references_shapes(model, context) -> None:
    shares = read_shares(model, context)
    merged = context.grid[:, 1:] // model.config.merge_size
    assert [list(part.shape) for part in shares.maps] == merged.tolist()


def test_maps_lie_where_the_image_tokens_are(model, context) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)[0].mean(dim=(0, 1))
    for part, (start, end) in zip(read_shares(model, context).maps, context.spans, strict=True):
        assert torch.allclose(part.flatten(), weights[start:end])


@torch.no_grad()
def test_first_token_sees_of_the_tokens_only_itself(model, context) -> None:
    weights = aggregation_attention(model.mllm.aggregator, context.states)[0, :, 0]
    assert read_shares(model, context, 0).tokens == pytest.approx(
        float(weights[:, context.states.shape[1]].mean()), rel=1e-5
    )


def test_pooled_is_the_mean_over_tokens(model, context) -> None:
    each = [read_shares(model, context, token).text for token in range(model.config.num_tokens)]
    assert read_shares(model, context).text == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("token", [-2, 10**6])
def test_token_that_is_not_there(model, context, token) -> None:
    with pytest.raises(ValueError, match=f"Reference token {token} does not exist"):
        read_shares(model, context, token)


def test_bfloat16_model(context) -> None:
    model = er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.bfloat16)
    shares = read_shares(model, context)
    assert shares.maps[0].dtype == torch.float32
    assert sum(shares.references) + shares.template + shares.text + shares.tokens == pytest.approx(
        1, abs=1e-5
    )
