"""Attention masks: weight of the reference term at each query token, from a mask on the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..utils.area_mean import area_means, overlaps

if TYPE_CHECKING:
    from torch import Tensor


class Crop(NamedTuple):
    """A rectangle of a latent, the UNet's input, in latent pixels.

    A crop that reaches over the bottom or the right edge continues at the opposite edge.
    """

    latent: tuple[int, int]  # (height, width) of the full latent
    top: int
    left: int
    height: int
    width: int


def full_crop(height: int, width: int) -> Crop:
    """The crop that is the full latent."""
    return Crop((height, width), 0, 0, height, width)


def token_mask(mask: Tensor, crop: Crop, grid: tuple[int, int]) -> Tensor:
    """mask (frames, any height, any width), which covers the full latent -> (frames, tokens), float64.

    grid: (rows, columns) of the tokens, which cover the crop. Each token gets the mean of the mask over its
    area. A mask of ones gives ones, of zeros zeros, exactly.
    """
    rows = _overlaps(mask.shape[1], crop.latent[0], crop.top, crop.height, grid[0])
    columns = _overlaps(mask.shape[2], crop.latent[1], crop.left, crop.width, grid[1])
    return area_means(mask, rows, columns).flatten(1)


def _overlaps(pixels: int, latent: int, start: int, length: int, tokens: int) -> Tensor:
    """Overlap of each token with each mask pixel along one axis, (tokens, pixels), in integers."""
    # a level of the UNet halves, rounding up: the last token of an odd length covers less
    strides = (2**level for level in range(length.bit_length() + 1))
    stride = next((stride for stride in strides if -(-length // stride) == tokens), None)
    index = torch.arange(tokens + 1, dtype=torch.float64)
    if stride:
        edges = (start + (index * stride).clamp(max=length)) * tokens * pixels
    else:  # another pack resized the activations: tokens of equal length
        edges = (start * tokens + index * length) * pixels
    marks = torch.arange(2 * pixels + 1, dtype=torch.float64) * latent * tokens
    # columns [pixels, 2 * pixels) are the wrapped-around axis
    first, wrapped = overlaps(edges, marks).split(pixels, dim=1)
    return first + wrapped
