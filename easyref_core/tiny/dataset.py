"""Training images of the procedural dataset, rendered once: each allowed combination, several times."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from .images import COUNTS, all_combinations, held_out, render


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images (M, 64, 64, 3) and their attributes (M, 5)."""

    images: NDArray[np.uint8]
    attributes: NDArray[np.integer]
    copies: int  # consecutive images of each combination
    first: NDArray[np.integer]  # combination number -> index of its first image

    def sample(self, attributes: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw the index of an image for each row of attributes (N, 5)."""
        return self.first[combination(attributes)] + rng.integers(self.copies, size=len(attributes))


def combination(attributes: NDArray[np.integer]) -> NDArray[np.integer]:
    """Attributes (N, 5) -> the number of their combination (N,)."""
    return np.ravel_multi_index(attributes.T, COUNTS)


def draw_dataset(seed: int, copies: int) -> Dataset:
    """Render `copies` images of every combination that is not held out."""
    combinations = all_combinations()
    allowed = combinations[~held_out(combinations)]
    attributes = np.repeat(allowed, copies, axis=0)
    first = np.full(len(combinations), -1)
    first[combination(allowed)] = np.arange(len(allowed)) * copies
    return Dataset(render(attributes, np.random.default_rng(seed)), attributes, copies, first)
