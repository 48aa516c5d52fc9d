"""What the weight scales: V's output, K too, or only what the tokens share; against attention written out by hand."""

from __future__ import annotations

import pytest
import torch

from easyref_core.attention import SCALINGS, reference_attention, require_scaling, scaled

HEADS, INNER, WIDEST = 2, 8, 16


@pytest.fixture
def qkv() -> tuple:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, tokens, INNER, generator=random) for tokens in (5, 6, 6))


def attention(q, k, v):
    split = [t.unflatten(-1, (HEADS, -1)).movedim(-2, -3) for t in (q, k, v)]
    scores = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
    return (scores.softmax(-1) @ split[2]).movedim(-3, -2).flatten(-2)


@pytest.mark.parametrize("weight", [-1.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaling(qkv, scaling: str, weight: float) -> None:
    q, k, v = qkv
    narrow = weight * INNER / WIDEST
    wanted = {
        "V only": lambda: attention(q, k, v) * weight,
        "K+V": lambda: attention(q, k * weight, v * weight),
        "K+V w/ C penalty": lambda: attention(q, k * narrow, v * narrow),
        "K+mean(V) w/ C penalty": lambda: attention(q, k * narrow, v - v.mean(1) + v.mean(1) * narrow),
    }[scaling]()
    key_value, left = scaled((k, v), weight, scaling, WIDEST)
    torch.testing.assert_close(reference_attention(q, key_value, HEADS, left), wanted)


def test_v_only_hands_on_what_it_gets(qkv) -> None:
    pair = qkv[1:]
    assert scaled(pair, 0.3, "V only", WIDEST) == (pair, 0.3)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="no embeds_scaling 'Q'"):
        require_scaling("Q")
