"""Squares to crop references to. Nothing is cropped unless it is asked for: the MLLM reads every aspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside


def middle_square(height: int, width: int) -> Box:
    """The largest square in the middle of a picture."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def square_around(mask: Tensor, height: int, width: int, padding: float, name: str = "The mask") -> Box:
    """The square around what a mask (h, w), of any size, marks (above 0.5) in a picture of height x width pixels.

    Its side is the longer one of the marked part's bounding box times `padding`, but no longer than the picture's
    shorter side; where it would reach over an edge it is moved in.
    Raises ValueError for a mask that marks nothing; the error calls it `name`.
    """
    marked = mask > 0.5
    rows, columns = (marked.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise ValueError(
            f"{name} marks nothing (no value above 0.5), so there is nothing to crop around. Paint it in the mask "
            "editor, or choose another crop."
        )
    down, across = height / mask.shape[0], width / mask.shape[1]
    top, bottom = int(rows[0]) * down, (int(rows[-1]) + 1) * down
    left, right = int(columns[0]) * across, (int(columns[-1]) + 1) * across
    side = round(min(padding * max(bottom - top, right - left), height, width))
    side = max(side, 1)
    x, y = (
        min(max(round((start + end - side) / 2), 0), length - side)
        for start, end, length in ((left, right, width), (top, bottom, height))
    )
    return x, y, x + side, y + side
