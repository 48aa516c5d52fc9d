"""The pictures of a training, drawn once: every allowed combination of attributes, several times over."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from .images import COUNTS, every_picture, held_out, render

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Pool:
    """Pictures (M, 64, 64, 3) and their attributes (M, 5); `where` (combinations,) -> the first of `copies` in a row."""

    pictures: NDArray[np.uint8]
    attributes: NDArray[np.integer]
    copies: int
    where: NDArray[np.integer]

    def find(self, attributes: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.integer]:
        """Index of one picture for each row of attributes (N, 5)."""
        return self.where[combination(attributes)] + rng.integers(self.copies, size=len(attributes))


def combination(attributes: NDArray[np.integer]) -> NDArray[np.integer]:
    """Attributes (N, 5) -> the number of their combination."""
    return np.ravel_multi_index(attributes.T, COUNTS)


def draw_pool(seed: int, copies: int) -> Pool:
    """`copies` pictures of every combination that trainings may see."""
    every = every_picture()
    kept = every[~held_out(every)]
    attributes = np.repeat(kept, copies, axis=0)
    where = np.full(len(every), -1)
    where[combination(kept)] = np.arange(len(kept)) * copies
    return Pool(render(attributes, np.random.default_rng(seed)), attributes, copies, where)
