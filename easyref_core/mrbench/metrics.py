"""What is measured, as pure functions of features and of scores; where features come from is extractors.py's matter.

N pictures, M images, D the width of a feature, G groups. Features need no normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

CLIP_SCORE_SCALE = 2.5  # CLIPScore (arXiv 2104.08718), equation 1
RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 22  # resampled values held in memory at once


class Interval(NamedTuple):
    """An estimate and its confidence interval; both ends are NaN where fewer than two groups were measured."""

    mean: float
    low: float
    high: float


def cosine(a: Floats, b: Floats) -> Floats:
    """Cosine of every pair: (N, D), (M, D) -> (N, M)."""
    return _normalised(a) @ _normalised(b).T


def clip_i(pictures: Floats, images: Floats) -> Floats:
    """CLIP-I: cosine of CLIP image features. (N, D), (M, D) -> (N, M), in -1..1."""
    return cosine(pictures, images)


def dino_i(pictures: Floats, images: Floats) -> Floats:
    """DINO-I: cosine of DINO's CLS tokens. (N, D), (M, D) -> (N, M), in -1..1."""
    return cosine(pictures, images)


def clip_t_cosine(pictures: Floats, text: Floats) -> Floats:
    """CLIP-T: cosine of CLIP image features and one prompt's text feature. (N, D), (D,) -> (N,), in -1..1."""
    return cosine(pictures, text[None])[:, 0]


def clip_score(pictures: Floats, text: Floats) -> Floats:
    """CLIPScore, 2.5 max(cosine, 0). (N, D), (D,) -> (N,), in 0..2.5."""
    return CLIP_SCORE_SCALE * np.maximum(clip_t_cosine(pictures, text), 0)


def to_target(similarities: Floats) -> Floats:
    """Similarity to the group's one target: (N, 1) -> (N,)."""
    (column,) = similarities.T
    return column


def to_references(similarities: Floats) -> Floats:
    """Mean similarity to the group's M references: (N, M) -> (N,)."""
    return similarities.mean(axis=1)


def bootstrap(values: Floats, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Mean of one value a group (G,), and its percentile interval over groups drawn with replacement."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    if len(values) == 1:
        return Interval(float(values[0]), np.nan, np.nan)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1)
            for n in _chunks(resamples, len(values))
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: Floats, b: Floats, seed: int = 0, **options: float) -> Interval:
    """Mean of a - b over the groups both were measured on, (G,) and (G,); groups are drawn, so pairs stay together."""
    return _paired(a, b, np.subtract, seed, **options)


def win_rate(a: Floats, b: Floats, seed: int = 0, **options: float) -> Interval:
    """Part of the groups on which a is above b, (G,) and (G,), in 0..1; a tie counts one half to each."""
    return _paired(a, b, lambda x, y: (1 + np.sign(x - y)) / 2, seed, **options)


def _paired(
    a: Floats, b: Floats, compare: Callable[[Floats, Floats], Floats], seed: int, **options: float
) -> Interval:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"Paired scores have shapes {a.shape} and {b.shape}; wanted one of each for every group."
        )
    return bootstrap(compare(a, b), seed, **options)


def _chunks(resamples: int, groups: int) -> Iterator[int]:
    """How many resamples to draw at a time."""
    most = max(1, CHUNK // groups)
    while resamples > 0:
        yield min(most, resamples)
        resamples -= most


def _normalised(features: Floats) -> Floats:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
