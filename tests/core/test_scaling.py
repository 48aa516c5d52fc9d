"""Scalings of the reference term, against attention written out by hand; sums in place."""

from __future__ import annotations

import pytest
import torch

from easyref_core.unet.reference_attention import SCALINGS, apply_weight, reference_attention, require_scaling
from easyref_core.utils.in_place import add_in_place

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
    torch.testing.assert_close(
        reference_attention(q, apply_weight((k, v), weight, scaling, WIDEST), HEADS), wanted
    )


def test_v_only_leaves_the_keys_and_at_weight_1_the_values(qkv) -> None:
    keys, values = qkv[1:]
    half, full = (apply_weight((keys, values), weight, "V only", WIDEST) for weight in (0.5, 1.0))
    assert half[0] is full[0] is keys
    assert full[1] is values
    assert torch.equal(half[1], values * 0.5)


def test_sum_overwrites_the_second_term() -> None:
    text, term = torch.randn(2, 1, 3, 4)
    wanted, before = text + term, text.clone()
    found = add_in_place(text, term)
    assert found.data_ptr() == term.data_ptr()
    assert torch.equal(found, wanted)
    assert torch.equal(text, before)


@pytest.mark.parametrize("learning", [0, 1])
def test_sum_with_gradients_overwrites_nothing(learning: int) -> None:
    parts = list(torch.randn(2, 1, 3, 4))
    parts[learning].requires_grad_()
    before = [part.detach().clone() for part in parts]
    add_in_place(*parts).sum().backward()
    assert all(torch.equal(part, was) for part, was in zip(parts, before, strict=True))
    assert parts[learning].grad is not None


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="embeds_scaling is 'Q'; wanted one of: V only, "):
        require_scaling("Q")


def test_batch_must_be_a_multiple_of_the_rows() -> None:
    key_value = (torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    for batch in (1, 3):
        with pytest.raises(RuntimeError):
            reference_attention(torch.randn(batch, 4, 8), key_value, 2)


def test_sum_has_the_promoted_dtype() -> None:
    wide, narrow = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert add_in_place(wide, narrow).dtype == torch.float32
    assert add_in_place(narrow, wide).dtype == torch.float32
