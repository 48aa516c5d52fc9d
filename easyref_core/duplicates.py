"""References that are the same picture twice: they add length to a group and nothing to what it has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .preprocess import to_rgb

SIDE = 16  # pixels: what two pictures are compared at
NEAR = 0.03  # of the range of values, root mean square: another size or compression stays below it


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """Two references, numbered from 1, that are the same (exact) or nearly the same picture."""

    first: int
    second: int
    exact: bool


def duplicates(images: Sequence[Image.Image | Tensor]) -> list[Duplicate]:
    """The references that repeat an earlier one, each with the first that it repeats.

    images: as for preprocess; what holds no picture is like no other.
    """
    small = [_small(image) for image in images]
    found: dict[int, Duplicate] = {}
    for a, b in combinations(range(len(images)), 2):
        if b not in found and a not in found and _near(small[a], small[b]):
            found[b] = Duplicate(a + 1, b + 1, _equal(images[a], images[b]))
    return list(found.values())


def thumbnail(image: Image.Image | Tensor, side: int) -> Image.Image:
    """The picture as RGB, no side longer than `side` pixels. Large ones are thinned out first, so it takes no time.

    Raises ValueError for what holds no picture.
    """
    if isinstance(image, Tensor) and image.ndim == 3:
        step = max(1, max(image.shape[:2]) // (4 * side))
        image = image[::step, ::step] if min(image.shape[:2]) // step >= 14 else image
    rgb = to_rgb(image)
    rgb.thumbnail((side, side), Image.Resampling.BOX)
    return rgb


def _small(image: Image.Image | Tensor) -> tuple[float, np.ndarray] | None:
    """Aspect, and (SIDE, SIDE, 3) in 0..1."""
    try:
        rgb = thumbnail(image, 4 * SIDE)
    except ValueError:
        return None
    small = rgb.resize((SIDE, SIDE), Image.Resampling.BOX)
    return rgb.width / rgb.height, np.asarray(small, dtype=np.float32) / 255


def _near(a: tuple[float, np.ndarray] | None, b: tuple[float, np.ndarray] | None) -> bool:
    if a is None or b is None or not 0.95 <= a[0] / b[0] <= 1.05:
        return False
    return float(np.square(a[1] - b[1]).mean()) <= NEAR**2


def _equal(a: Image.Image | Tensor, b: Image.Image | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return np.array_equal(to_rgb(a), to_rgb(b))
