"""Optional crops of a reference: squares, around its middle or around a mask. The path itself never crops."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Square(NamedTuple):
    """A square inside a picture, in pixels."""

    top: int
    left: int
    side: int

    def of(self, picture: Tensor) -> Tensor:
        """The part of a picture (..., height, width, channels)."""
        return picture[..., self.top : self.top + self.side, self.left : self.left + self.side, :]


def middle_square(height: int, width: int) -> Square:
    """The largest square around the middle."""
    return square_around((0, 0, height, width), height, width)


def mask_square(mask: Tensor, padding: float) -> Square:
    """A square around what a mask (height, width) marks, 0..1, with `padding` of its longer side added on each side.

    It stays inside the picture: near an edge it moves, and it is never larger than the picture's shorter side.
    Raises ValueError for a mask that marks nothing.
    """
    rows, columns = (mask > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        raise ValueError(
            "The mask marks nothing of the reference: no value is above 0.5. Paint over what shall be cropped to."
        )
    top, left, bottom, right = (
        int(x) for x in (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    )
    more = round(padding * max(bottom - top, right - left))
    return square_around((top - more, left - more, bottom + more, right + more), *mask.shape)


def square_around(box: tuple[int, int, int, int], height: int, width: int) -> Square:
    """The square inside a picture that covers most of a box (top, left, bottom, right), around its middle."""
    top, left, bottom, right = box
    side = min(max(bottom - top, right - left), height, width)
    place = [
        min(max((low + high - side) // 2, 0), length - side)
        for low, high, length in ((top, bottom, height), (left, right, width))
    ]
    return Square(*place, side)


def fitted(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (height', width') of another size, as (height, width)."""
    if mask.shape == (height, width):
        return mask
    return torch.nn.functional.interpolate(mask[None, None].float(), (height, width), mode="area")[0, 0]
