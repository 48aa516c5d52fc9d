"""A mask on the picture -> how much each query token of an attention gets of the reference term."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Crop(NamedTuple):
    """The part of a latent that the UNet is given, in latent pixels; `latent`: (height, width) of the whole one.

    A crop that reaches over the bottom or the right edge goes on at the opposite one.
    """

    latent: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


def whole(height: int, width: int) -> Crop:
    return Crop((height, width), 0, 0, height, width)


def token_mask(mask: Tensor, crop: Crop, grid: tuple[int, int]) -> Tensor:
    """mask (frames, any height, any width), which covers the whole latent -> (frames, tokens), float64.

    grid: (rows, columns) of the tokens, which cover the crop: each the mean of the mask over the token's area. A mask
    of ones gives ones, of zeros zeros, exactly.
    """
    rows = _overlaps(mask.shape[1], crop.latent[0], crop.top, crop.height, grid[0])
    columns = _overlaps(mask.shape[2], crop.latent[1], crop.left, crop.width, grid[1])
    lengths = rows.sum(1)[:, None], columns.sum(1)
    # whole numbers until each division, so that a sum of overlaps over its length is exactly 1
    frames = [((rows @ frame.double()) / lengths[0] @ columns.T) / lengths[1] for frame in mask]
    return torch.stack(frames).flatten(1)


def _overlaps(pixels: int, latent: int, first: int, length: int, tokens: int) -> Tensor:
    """Along one axis: how far each token's stretch covers each mask pixel, (tokens, pixels), in whole numbers."""
    # a level of the UNet halves, rounding up: the last token of an odd length covers less
    strides = (2**level for level in range(length.bit_length() + 1))
    stride = next((stride for stride in strides if -(-length // stride) == tokens), None)
    counted = torch.arange(tokens + 1, dtype=torch.float64)
    if stride:
        edges = (first + (counted * stride).clamp(max=length)) * tokens * pixels
    else:  # another pack resized the activations: tokens of equal stretches
        edges = (first * tokens + counted * length) * pixels
    marks = torch.arange(2 * pixels + 1, dtype=torch.float64) * latent * tokens
    upper = torch.minimum(edges[1:, None], marks[None, 1:])
    lower = torch.maximum(edges[:-1, None], marks[None, :-1])
    overlaps = (upper - lower).clamp(min=0)
    # the second half is the same axis again, beyond its end
    return overlaps[:, :pixels] + overlaps[:, pixels:]
