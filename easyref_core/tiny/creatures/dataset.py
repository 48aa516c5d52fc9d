"""Training images: identities, each alone in one image and among others in several."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .identities import Floats, draw_identities
from .images import GROUNDS, PLACES, Scenes, alone, among_others, render


@dataclasses.dataclass(frozen=True)
class Dataset:
    """P identities with one target each, and V views among others."""

    identities: Floats  # (P, 13)
    targets: NDArray[np.uint8]  # (P, 64, 64, 3), each identity alone
    target_scenes: Scenes
    places: NDArray[np.integer]  # (P,), of the targets; indices of PLACES
    views: NDArray[np.uint8]  # (P, V, 64, 64, 3), each identity among others
    view_scenes: Scenes  # of P * V images

    def __len__(self) -> int:
        return len(self.identities)

    @property
    def grounds(self) -> NDArray[np.integer]:
        """Grounds of the targets (P,), indices of GROUNDS."""
        return self.target_scenes.grounds


@lru_cache(maxsize=1)
def draw_dataset(seed: int, count: int, views: int) -> Dataset:
    """Draw `count` identities, and render a target and `views` views of each."""
    rng = np.random.default_rng(seed)
    identities = draw_identities(rng, count)
    places = rng.integers(len(PLACES), size=count)
    targets = alone(identities, rng.integers(len(GROUNDS), size=count), places)
    scenes = among_others(np.repeat(identities, views, axis=0), rng)
    images = render(scenes, rng)
    images = images.reshape(count, views, *images.shape[1:])
    return Dataset(
        identities=identities,
        targets=render(targets, rng),
        target_scenes=targets,
        places=places,
        views=images,
        view_scenes=scenes,
    )
