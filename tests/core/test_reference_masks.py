"""Masks of references in the aggregation: ones are bit-identical, a token's weight is its area's mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, error
from easyref_core.tokens.aggregator import weight_bias
from easyref_core.utils.area_mean import grid_means

from .by_hand import gather
from .errors import assert_says, error_of

SIZES = [(1, 1), (7, 5), (64, 64), (333, 517)]


def plain(tokens: Tensor) -> Tensor:
    return tokens.as_subclass(Tensor)


def halves(context: er.ContextStates) -> list[Tensor]:
    """Masks of the left half of each reference, one pixel for each image token."""
    masks = [torch.zeros(grid) for grid in context.token_grids]
    for mask in masks:
        mask[:, : mask.shape[1] // 2] = 1
    return masks


def test_token_grids_are_those_of_the_encoded_images(model: er.EasyRef, context: er.ContextStates) -> None:
    merged = (context.grid[:, 1:] // model.config.merge_size).tolist()
    assert context.token_grids == [tuple(sides) for sides in merged]
    assert [rows * columns for rows, columns in context.token_grids] == [b - a for a, b in context.spans]


@pytest.mark.parametrize("size", SIZES)
def test_ones_of_any_size_and_no_masks_are_bit_identical(model, context, size: tuple[int, int]) -> None:
    wanted = plain(model.aggregate(context))
    for masks in ([torch.ones(size)] * 3, [None] * 3, [None, torch.full(size, 2.0), torch.ones(size)]):
        masked = context.masked(masks)
        assert masked.masks is None
        assert torch.equal(plain(model.aggregate(masked)), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_of_zeros_is_weight_0_bit_for_bit(model, context, size: tuple[int, int]) -> None:
    masked = context.masked([None, torch.zeros(size), None])
    assert torch.equal(plain(model.aggregate(masked)), plain(model.aggregate(context.weighed([1, 0, 1]))))


def test_masks_of_zeros_alone_are_finite(model: er.EasyRef, context: er.ContextStates) -> None:
    assert torch.isfinite(model.aggregate(context.masked([torch.zeros(9, 9)] * 3))).all()


@torch.inference_mode()
def test_attention_matches_the_one_computed_by_hand(context: er.ContextStates) -> None:
    fresh = er.load(golden.CHECKPOINT, golden.MLLM)  # because its aggregator is changed
    aggregator, tokens = fresh.mllm.aggregator.double(), fresh.config.num_tokens
    # 4 x 6 pixels for each image token, so that its weight is the mean of that block
    masks = [torch.rand(4 * rows, 6 * columns) for rows, columns in context.token_grids]
    masks[1][:8] = 0
    factor = torch.ones(context.states.shape[1] + tokens, dtype=torch.float64)
    for (start, end), (rows, columns), mask in zip(context.spans, context.token_grids, masks, strict=True):
        blocks = mask.double().reshape(rows, 4, columns, 6)
        factor[start:end] = blocks.mean(dim=(1, 3)).flatten()
    bias = weight_bias(context.masked(masks), tokens).double()

    wanted = gather(aggregator, fresh.config, context.states, factor)
    found = aggregator.gather(context.states.double(), attn_bias=bias)
    assert error(found, wanted) <= 1e-6  # RoPE is in float32


def test_what_is_outside_the_mask_is_ignored(model: er.EasyRef, context: er.ContextStates) -> None:
    masks, states = halves(context), context.states.clone()
    for (start, end), mask in zip(context.spans, masks, strict=True):
        outside = start + (mask.flatten() == 0).nonzero().flatten()
        assert 0 < len(outside) < end - start
        states[:, outside] = torch.randn(len(outside), states.shape[-1])
    other = dataclasses.replace(context, states=states)
    found, wanted = (model.aggregate(each.masked(masks)) for each in (other, context))
    assert error(found, wanted) <= EXACT
    assert error(model.aggregate(other), model.aggregate(context)) > 0.001
    assert error(wanted, model.aggregate(context)) > 0.001


def test_weights_and_masks_multiply_in_any_order(model: er.EasyRef, context: er.ContextStates) -> None:
    masks = halves(context)
    first, second = context.weighed([1, 0.5, 2]).masked(masks), context.masked(masks).weighed([1, 0.5, 2])
    bias = weight_bias(first, model.config.num_tokens)[0].exp()
    for (start, end), mask, weight in zip(context.spans, masks, (1, 0.5, 2), strict=True):
        torch.testing.assert_close(bias[start:end], mask.flatten() * weight)
    assert torch.equal(plain(model.aggregate(first)), plain(model.aggregate(second)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [(1, 1), (12, 12), (3, 20)])
def test_grid_means(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert (grid_means(torch.ones(1, *size), grid) == 1).all()
    assert (grid_means(torch.zeros(1, *size), grid) == 0).all()
    image = torch.rand(1, *size, dtype=torch.float64)
    found = grid_means(image, grid)
    # repeated to a common multiple, each cell is a block
    fine = image.repeat_interleave(grid[0], dim=1).repeat_interleave(grid[1], dim=2)
    blocks = fine.reshape(1, grid[0], size[0], grid[1], size[1])
    torch.testing.assert_close(found, blocks.mean(dim=(2, 4)))


@pytest.mark.parametrize(
    ("masks", "parts"),
    [
        ([None, None], ["2 masks for 3 references", "one for each"]),
        ([torch.ones(1, 8, 8)] * 3, ["mask of reference 1", "(1, 8, 8)", "wanted (height, width)"]),
        ([None, torch.ones(0, 8), None], ["mask of reference 2", "(0, 8)"]),
        ([None, None, torch.full((8, 8), torch.nan)], ["mask of reference 3", "NaN"]),
    ],
)
def test_invalid_masks_are_refused(context: er.ContextStates, masks: list, parts: list[str]) -> None:
    assert_says(error_of(lambda: context.masked(masks)), *parts)
