"""Area means: the cells of a grid get the mean of an image of any size over their area."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def grid_means(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """images (N, any height, any width) -> (N, rows, columns), float64: cells of equal size cover the image.

    Ones give ones, zeros zeros, exactly.
    """
    return area_means(images, *map(_equal_cells, images.shape[1:], grid))


def area_means(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images (N, H, W) -> (N, rows, columns), float64. rows, columns: of `overlaps`, (cells, pixels)."""
    # integers until each division, so that a sum of overlaps over its length is exactly 1
    lengths = rows.sum(1)[:, None], columns.sum(1)
    return torch.stack([((rows @ image.double()) / lengths[0] @ columns.T) / lengths[1] for image in images])


def overlaps(cells: Tensor, pixels: Tensor) -> Tensor:
    """Overlap of each cell with each pixel along one axis, (cells, pixels), given the edges of both."""
    upper = torch.minimum(cells[1:, None], pixels[None, 1:])
    lower = torch.maximum(cells[:-1, None], pixels[None, :-1])
    return (upper - lower).clamp(min=0)


def _equal_cells(pixels: int, cells: int) -> Tensor:
    """Overlaps of `cells` equal cells with `pixels` equal pixels of one length, in integers."""
    cell_edges, pixel_edges = (torch.arange(n + 1, dtype=torch.float64) for n in (cells, pixels))
    return overlaps(cell_edges * pixels, pixel_edges * cells)
