"""Identities of creatures: 13 continuous numbers in -1..1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

# The parts of an identity and how many numbers each has, in this order.
PARTS = {"outline": 4, "colours": 6, "pattern": 3}
NUMBERS = sum(PARTS.values())
VARIANCE = 1 / 3  # of a number, which is uniform in -1..1

HARMONICS = (2, 3)  # of the outline; each has a cosine and a sine
AMPLITUDES = (0.22, 0.17)  # maximum of each, in radii
FREQUENCY = (0.55, 1.35)  # of the stripes, minimum and maximum, in periods per radius
ANGLE = 1.1  # of the stripes, maximum, in radians
THRESHOLD = 0.45  # of the stripes' wave, maximum: which of the two colours is wider


def draw_identities(rng: np.random.Generator, *shape: int) -> Floats:
    """Draw identities (*shape, 13)."""
    return rng.uniform(-1, 1, (*shape, NUMBERS)).astype(np.float32)


def split(identities: Floats) -> dict[str, Floats]:
    """Split identities (..., 13) into their parts: outline (..., 4), colours (..., 6), pattern (..., 3)."""
    ends = np.cumsum(list(PARTS.values()))[:-1]
    return dict(zip(PARTS, np.split(identities, ends, axis=-1), strict=True))
