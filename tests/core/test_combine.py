"""Combinations and batches of reference tokens: the values, the neutral cases, and the errors."""

from __future__ import annotations

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.mllm.context import Provenance
from easyref_core.tokens.combine import METHODS, combine
from easyref_core.tokens.frames import EASINGS, batch, distinct, over_frames

from .errors import assert_says, error_of

CAT = Provenance("checkpoint", "look", "a cat", 3, 336)
DOG = Provenance("checkpoint", "look", "a dog", 2, 224)


def tokens(
    seed: int = 0, rows: int = 1, count: int = 4, provenance: Provenance = CAT, size: float = 1.0
) -> er.ReferenceTokens:
    random = torch.Generator().manual_seed(seed)
    return er.ReferenceTokens.of(size * torch.randn(rows, count, 8, generator=random), provenance)


A, B, C = (tokens(seed) for seed in range(3))
LONG, BATCH, LARGE = tokens(1, count=8), tokens(1, rows=3), tokens(1, size=5.0)
FOREIGN = tokens(1, provenance=Provenance("another", "look", "a cat", 3, 336))


def close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    values, expected = torch.Tensor(values), torch.Tensor(expected)
    return values.shape == expected.shape and torch.allclose(values, expected, atol=1e-6)


# Values


def test_concat_keeps_each_token_in_order() -> None:
    assert torch.equal(combine([A, B, C], "concat"), torch.cat([torch.Tensor(t) for t in (A, B, C)], dim=1))
    assert combine([A, BATCH], "concat").shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("sets", "method", "settings", "expected"),
    [
        ([A, B, C], "average", {}, (A + B + C) / 3),
        ([A, B], "average", {"weights": [3, 1]}, 0.75 * A + 0.25 * B),
        ([A, BATCH], "average", {}, (A + BATCH) / 2),
        ([A, B, C], "add", {"weights": [1, 0.5, 2]}, A + 0.5 * B + 2 * C),
        ([A, B, C], "subtract", {"weights": [2, 1, 3]}, 2 * A - (B + 3 * C) / 4),
        ([A, B], "interpolate", {"factor": 0.25}, 0.75 * A + 0.25 * B),
    ],
)
def test_values(sets: list, method: str, settings: dict, expected: torch.Tensor) -> None:
    assert close(combine(sets, method, **settings), expected)


def test_norm_average_has_the_direction_of_the_mean_and_the_mean_length() -> None:
    combined, mean = combine([A, LARGE], "norm average"), (A + LARGE) / 2
    assert close(combined.norm(dim=-1), (A.norm(dim=-1) + LARGE.norm(dim=-1)) / 2)
    assert close(torch.cosine_similarity(torch.Tensor(combined), mean, dim=-1), torch.ones(1, 4))
    opposite = er.ReferenceTokens.of(-1 * A, CAT)
    assert torch.equal(combine([A, opposite], "norm average"), torch.zeros(1, 4, 8))


def test_provenance_names_the_parts_and_the_operation() -> None:
    provenance = combine([A, tokens(1, provenance=DOG)], "average", [1, 0.5]).provenance
    assert provenance == Provenance(
        "checkpoint",
        "look",
        "a cat | a dog",
        5,
        336,
        how="average of 2, weights 1, 0.5",
        parts=(CAT, DOG),
    )


# Neutral cases


@pytest.mark.parametrize("method", METHODS)
def test_one_set_or_weights_of_1_change_nothing(method: str) -> None:
    assert combine([A], method) is A
    assert torch.equal(combine([A, B], method, [1.0, 1.0]), combine([A, B], method))


@pytest.mark.parametrize("method", ["concat", "average", "norm average", "add", "subtract"])
def test_weight_0_leaves_a_set_out(method: str) -> None:
    assert combine([A, B], method, [1, 0]) is A
    assert torch.equal(combine([A, B, C], method, [1, 0, 1]), combine([A, C], method))


def test_interpolate_at_its_ends_is_the_inputs() -> None:
    assert combine([A, B], "interpolate", factor=0) is A
    assert combine([A, B], "interpolate", factor=1) is B


@pytest.mark.parametrize("method", ["average", "norm average", "interpolate"])
def test_equal_sets_are_that_set(method: str) -> None:
    """The unconditional tokens of several groups are equal: those of the black image."""
    again = er.ReferenceTokens.of(torch.Tensor(A).clone(), CAT)
    assert torch.equal(combine([A, again], method), A)
    if method != "interpolate":
        assert torch.equal(combine([A, again, again], method, [1, 0.3, 0.7]), A)


# Errors


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: combine([A, FOREIGN]), ["Set 1 and set 2", "checkpoint and another", "one checkpoint"]),
        (lambda: batch([A, FOREIGN]), ["Set 1 and set 2", "checkpoint and another", "one checkpoint"]),
        (lambda: combine([A, B], "average", [1]), ["1 weights for 2 sets"]),
        (lambda: combine([A, B], "average", [1, -1]), ["[1, -1]", "from 0", "subtract"]),
        (lambda: combine([A, B], "average", [1, float("nan")]), ["nan", "from 0"]),
        (lambda: combine([A, B], "average", [0, 0]), ["All weights are 0", "at least one"]),
        (lambda: combine([A, B], "max"), ["'max'", "concat, average"]),
        (lambda: combine([]), ["is empty", "at least one"]),
        (lambda: combine([A, B, C], "interpolate"), ["there are 3", "average"]),
        (lambda: combine([A, B], "interpolate", factor=1.5), ["1.5", "0 (the first"]),
        (lambda: combine([A, LONG], "add"), ["4, 8", "as many in each"]),
        (lambda: combine([tokens(rows=2), BATCH]), ["2 and 3 rows", "1 or 3"]),
        (lambda: batch([A, LONG]), ["4, 8 reference tokens", "as many in each", "concat"]),
        (lambda: over_frames([A, LONG], 5), ["4, 8 reference tokens", "as many in each", "concat"]),
        (lambda: over_frames([A, B, C], 2), ["2 frames are too few for 3"]),
        (lambda: over_frames([A, B], 5, "bounce"), ["'bounce'", "linear, ease in"]),
    ],
)
def test_misuse_is_refused(call, parts: list[str]) -> None:
    assert_says(error_of(call), *parts)


def test_plain_tensors_are_refused() -> None:
    assert_says(error_of(lambda: combine([A, torch.zeros(1, 4, 8)]), TypeError), "Set 2 is a Tensor")


# Batches and frames


def test_a_batch_has_the_rows_of_each_group() -> None:
    rows = batch([A, tokens(1, rows=2), C])
    assert rows.shape == (4, 4, 8)
    assert torch.equal(rows[:1], A)
    assert torch.equal(rows[3:], C)
    assert batch([A]) is A


@pytest.mark.parametrize("easing", EASINGS)
@pytest.mark.parametrize(("frames", "at"), [(3, [0, 1, 2]), (7, [0, 3, 6]), (101, [0, 50, 100])])
def test_frames_at_the_position_of_a_group_are_its_tokens(easing: str, frames: int, at: list[int]) -> None:
    faded = over_frames([A, B, C], frames, easing)
    assert faded.shape == (frames, 4, 8)
    assert torch.equal(faded[at], torch.cat([torch.Tensor(t) for t in (A, B, C)]))


@pytest.mark.parametrize(
    ("easing", "progress"),
    [("linear", 0.25), ("ease in", 0.0625), ("ease out", 0.4375), ("ease in-out", 0.15625)],
)
def test_easing(easing: str, progress: float) -> None:
    assert close(over_frames([A, B], 5, easing)[1:2], (1 - progress) * A + progress * B)


def test_one_group_fills_all_frames() -> None:
    assert torch.equal(over_frames([A], 3), torch.cat([torch.Tensor(A)] * 3))
    assert torch.equal(over_frames([A], 1), A)


def test_equal_rows_become_one() -> None:
    assert torch.equal(distinct(batch([A, A, A])), A)
    assert len(distinct(batch([A, B]))) == 2
    assert distinct(A) is A


# On a diffusers UNet


@pytest.fixture
def predicted(unet, model, expected):
    """The noise prediction under conditional and unconditional tokens."""

    def predicted(
        cond: torch.Tensor, uncond: torch.Tensor, inputs: golden.Tensors = expected
    ) -> torch.Tensor:
        attachment = er.diffusers_unet.apply(unet, model, cond, uncond)
        prediction = golden.predict(unet, inputs)
        attachment.remove()
        return prediction

    return predicted


def test_combined_tokens_condition_a_diffusers_unet(predicted, model, tokens, uncond) -> None:
    """A group joined with itself is that group: keys that occur twice weight the same values."""
    twice = er.combine([tokens, tokens]), er.combine([uncond, uncond])
    assert golden.error(predicted(*twice), predicted(tokens, uncond)) <= golden.EXACT
    other = model.aggregate(model.encode(golden.references()[:1], "a cat", size=golden.SIZE))
    joined = predicted(er.combine([tokens, other]), twice[1])
    assert golden.error(joined, predicted(tokens, uncond)) > 100 * golden.EXACT


def test_batched_tokens_condition_a_diffusers_unet(predicted, expected, tokens, uncond) -> None:
    frames = er.over_frames([tokens, er.combine([tokens, uncond], "average")], 2)
    alone = [predicted(row[None], uncond) for row in frames]
    together = predicted(frames, uncond, golden.twice(expected))
    assert golden.error(together, torch.stack(alone, dim=1).flatten(0, 1)) <= golden.EXACT


def test_unconditional_tokens_of_another_length_are_refused(predicted, tokens, uncond) -> None:
    joined = er.combine([tokens, tokens])
    shapes = str(tuple(joined.shape)), str(tuple(uncond.shape))
    assert_says(error_of(lambda: predicted(joined, uncond)), *shapes, "in the same way")
