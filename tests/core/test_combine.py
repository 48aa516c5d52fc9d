"""Sets of reference tokens made into one: what each method computes, what is neutral, what is refused."""

from __future__ import annotations

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.mllm.context import Provenance
from easyref_core.tokens.combine import METHODS, combine
from easyref_core.tokens.frames import EASINGS, batch, distinct, over_frames

from .errors import assert_says, error_of

MADE = Provenance("checkpoint", "look", "a cat", 3, 336)


def tokens(
    seed: int = 0, rows: int = 1, count: int = 4, made: Provenance = MADE, size: float = 1.0
) -> er.ReferenceTokens:
    random = torch.Generator().manual_seed(seed)
    return er.ReferenceTokens.of(size * torch.randn(rows, count, 8, generator=random), made)


A, B, C = (tokens(seed) for seed in range(3))


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(
        torch.Tensor(found), torch.Tensor(wanted), atol=1e-6
    )


# What is computed


def test_concat_keeps_every_token_in_order() -> None:
    joined = combine([A, B, C], "concat")
    assert joined.shape == (1, 12, 8)
    assert all(torch.equal(joined[:, 4 * i : 4 * i + 4], one) for i, one in enumerate((A, B, C)))


def test_average() -> None:
    assert same(combine([A, B, C], "average"), (A + B + C) / 3)


def test_average_by_shares() -> None:
    assert same(combine([A, B], "average", [3, 1]), 0.75 * A + 0.25 * B)


def test_norm_average_has_the_direction_of_the_mean_and_the_mean_length() -> None:
    longer = tokens(1, size=5.0)
    made, mean = combine([A, longer], "norm average"), (A + longer) / 2
    assert same(made.norm(dim=-1), (A.norm(dim=-1) + longer.norm(dim=-1)) / 2)
    assert same(torch.cosine_similarity(torch.Tensor(made), mean, dim=-1), torch.ones(1, 4))


def test_norm_average_of_opposite_tokens_is_finite() -> None:
    opposite = er.ReferenceTokens.of(-1 * A, MADE)
    assert torch.equal(combine([A, opposite], "norm average"), torch.zeros(1, 4, 8))


def test_add() -> None:
    assert same(combine([A, B, C], "add", [1, 0.5, 2]), A + 0.5 * B + 2 * C)


def test_subtract_takes_the_mean_of_the_others_from_the_first() -> None:
    assert same(combine([A, B, C], "subtract", [2, 1, 3]), 2 * A - (B + 3 * C) / 4)


def test_interpolate() -> None:
    assert same(combine([A, B], "interpolate", factor=0.25), 0.75 * A + 0.25 * B)


def test_one_row_goes_with_every_row_of_a_batch() -> None:
    many = tokens(1, rows=3)
    assert same(combine([A, many], "average"), (A + many) / 2)
    assert combine([A, many], "concat").shape == (3, 8, 8)


def test_the_result_says_what_it_was_made_of() -> None:
    dog = tokens(1, made=Provenance("checkpoint", "look", "a dog", 2, 224))
    made = combine([A, dog], "average", [1, 0.5]).provenance
    assert made == Provenance(
        "checkpoint",
        "look",
        "a cat | a dog",
        5,
        336,
        how="average of 2, weights 1, 0.5",
        parts=(MADE, dog.provenance),
    )


# What is neutral


@pytest.mark.parametrize("method", METHODS)
def test_one_set_is_itself(method: str) -> None:
    assert combine([A], method) is A


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_1_change_nothing(method: str) -> None:
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
    """As the black image is on every unconditional side."""
    again = er.ReferenceTokens.of(torch.Tensor(A).clone(), MADE)
    assert torch.equal(combine([A, again], method), A)
    if method != "interpolate":
        assert torch.equal(combine([A, again, again], method, [1, 0.3, 0.7]), A)


# What is refused


def test_different_checkpoints_are_refused() -> None:
    foreign = tokens(1, made=Provenance("another", "look", "a cat", 3, 336))
    for make in (lambda: combine([A, foreign]), lambda: batch([A, foreign])):
        assert_says(error_of(make), "Set 1 and set 2", "checkpoint and another", "one checkpoint")


def test_plain_tensors_are_refused() -> None:
    assert_says(error_of(lambda: combine([A, torch.zeros(1, 4, 8)]), TypeError), "Set 2 is a Tensor")


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1], ["1 weights for 2 sets"]),
        ([1, -1], ["[1, -1]", "from 0", "subtract"]),
        ([1, float("nan")], ["nan", "from 0"]),
        ([0, 0], ["All weights are 0", "at least one"]),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: list[float], parts: list[str]) -> None:
    assert_says(error_of(lambda: combine([A, B], "average", weights)), *parts)


def test_other_misuse_is_refused() -> None:
    assert_says(error_of(lambda: combine([A, B], "max")), "'max'", "concat, average")
    assert_says(error_of(lambda: combine([])), "no reference tokens", "at least one")
    assert_says(error_of(lambda: combine([A, B, C], "interpolate")), "there are 3", "average")
    assert_says(error_of(lambda: combine([A, B], "interpolate", factor=1.5)), "1.5", "0 (the first")
    assert_says(error_of(lambda: combine([A, tokens(1, count=8)], "add")), "4, 8", "as many in each")
    assert_says(error_of(lambda: combine([tokens(rows=2), tokens(rows=3)])), "2 and 3 rows", "1 or 3")


# Batches and frames


def test_a_batch_has_a_row_for_each_group() -> None:
    made = batch([A, tokens(1, rows=2), C])
    assert made.shape == (4, 4, 8)
    assert torch.equal(made[:1], A)
    assert torch.equal(made[3:], C)
    assert batch([A]) is A


def test_rows_of_unequal_length_are_refused() -> None:
    for make in (batch, lambda sets: over_frames(sets, 5)):
        error = error_of(lambda make=make: make([A, tokens(1, count=8)]))
        assert_says(error, "4, 8 reference tokens", "as many in each", "concat")


@pytest.mark.parametrize("easing", EASINGS)
@pytest.mark.parametrize(("frames", "at"), [(3, [0, 1, 2]), (7, [0, 3, 6]), (101, [0, 50, 100])])
def test_the_frames_of_the_groups_are_theirs(easing: str, frames: int, at: list[int]) -> None:
    made = over_frames([A, B, C], frames, easing)
    assert made.shape == (frames, 4, 8)
    for frame, one in zip(at, (A, B, C), strict=True):
        assert torch.equal(made[frame : frame + 1], one)


@pytest.mark.parametrize(
    ("easing", "part"),
    [("linear", 0.25), ("ease in", 0.0625), ("ease out", 0.4375), ("ease in-out", 0.15625)],
)
def test_easing(easing: str, part: float) -> None:
    assert same(over_frames([A, B], 5, easing)[1:2], (1 - part) * A + part * B)


def test_one_group_fills_all_frames() -> None:
    made = over_frames([A], 3)
    assert all(torch.equal(row[None], A) for row in made)
    assert torch.equal(over_frames([A], 1), A)


def test_frames_that_make_no_sense_are_refused() -> None:
    assert_says(error_of(lambda: over_frames([A, B, C], 2)), "2 frames are too few for 3")
    assert_says(error_of(lambda: over_frames([A, B], 5, "bounce")), "'bounce'", "linear, ease in")


def test_rows_that_are_the_same_are_one() -> None:
    assert torch.equal(distinct(batch([A, A, A])), A)
    assert len(distinct(batch([A, B]))) == 2
    assert distinct(A) is A


# The diffusers host


def test_combined_tokens_condition_a_diffusers_unet(unet, model, expected, tokens, uncond) -> None:
    """Twice the same group, joined, is that group: keys that are there twice weigh the same values."""

    def predicted(cond: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        attached = er.diffusers_unet.apply(unet, model, cond, negative)
        answer = golden.predict(unet, expected)
        attached.remove()
        return answer

    twice = er.combine([tokens, tokens]), er.combine([uncond, uncond])
    assert golden.error(predicted(*twice), predicted(tokens, uncond)) <= golden.EXACT
    other = model.aggregate(model.encode(golden.references()[:1], "a cat", size=golden.SIZE))
    joined = predicted(er.combine([tokens, other]), twice[1])
    assert golden.error(joined, predicted(tokens, uncond)) > 100 * golden.EXACT


def test_batched_tokens_condition_a_diffusers_unet(unet, model, expected, tokens, uncond) -> None:
    alone = []
    frames = er.over_frames([tokens, er.combine([tokens, uncond], "average")], 2)
    for row in frames:
        attached = er.diffusers_unet.apply(unet, model, row[None], uncond)
        alone.append(golden.predict(unet, expected))
        attached.remove()
    twice = {name: t.repeat_interleave(2, dim=0) for name, t in expected.items() if name.startswith("unet.")}
    er.diffusers_unet.apply(unet, model, frames, uncond)
    together = golden.predict(unet, twice)
    assert golden.error(together, torch.stack(alone, dim=1).flatten(0, 1)) <= golden.EXACT


def test_sides_of_unequal_length_are_refused(unet, model, tokens, uncond) -> None:
    joined = er.combine([tokens, tokens])
    assert_says(
        error_of(lambda: er.diffusers_unet.apply(unet, model, joined, uncond)),
        str(tuple(joined.shape)),
        str(tuple(uncond.shape)),
        "in the same way",
    )
