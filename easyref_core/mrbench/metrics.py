"""MRBench metrics and bootstrap intervals, as pure functions of features and scores.

N images, M images to compare with, D the width of a feature, G groups. Features need not be normalised.
CLIP-I and DINO-I are `cosine` of CLIP image features and of DINO's CLS tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

CLIP_SCORE_SCALE = 2.5  # CLIPScore (arXiv 2104.08718), equation 1
RESAMPLES = 10_000
LEVEL = 0.95
BATCH = 1000  # resamples in memory at once


class Interval(NamedTuple):
    """A mean and its confidence interval; both ends are NaN for fewer than two groups."""

    mean: float
    low: float
    high: float


def cosine(a: Floats, b: Floats) -> Floats:
    """Cosine of every pair: (N, D), (M, D) -> (N, M), in -1..1."""
    return _normalize(a) @ _normalize(b).T


def clip_t_cosine(images: Floats, text: Floats) -> Floats:
    """CLIP-T: cosine of CLIP image features and one prompt's text feature. (N, D), (D,) -> (N,), in -1..1."""
    return cosine(images, text[None])[:, 0]


def clip_score(images: Floats, text: Floats) -> Floats:
    """CLIPScore, 2.5 max(cosine, 0). (N, D), (D,) -> (N,), in 0..2.5."""
    return CLIP_SCORE_SCALE * np.maximum(clip_t_cosine(images, text), 0)


def to_target(similarities: Floats) -> Floats:
    """Similarity to the group's one target: (N, 1) -> (N,)."""
    (column,) = similarities.T
    return column


def to_references(similarities: Floats) -> Floats:
    """Mean similarity to the group's M references: (N, M) -> (N,)."""
    return similarities.mean(axis=1)


def bootstrap(values: Floats, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Mean of one value per group (G,), and its percentile bootstrap interval over groups."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return Interval(float(values[0]) if len(values) else np.nan, np.nan, np.nan)
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=BATCH,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return Interval(float(values.mean()), *map(float, result.confidence_interval))


def paired_difference(a: Floats, b: Floats, seed: int = 0) -> Interval:
    """Mean of a - b, (G,) and (G,); groups are resampled, so pairs stay together."""
    return _paired(a, b, np.subtract, seed)


def win_rate(a: Floats, b: Floats, seed: int = 0) -> Interval:
    """Fraction of the groups in which a is greater than b, (G,) and (G,); a tie counts one half."""
    return _paired(a, b, lambda x, y: (1 + np.sign(x - y)) / 2, seed)


def _paired(a: Floats, b: Floats, compare: Callable[[Floats, Floats], Floats], seed: int) -> Interval:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"Paired scores have shapes {a.shape} and {b.shape}; wanted one score of each for every group."
        )
    return bootstrap(compare(a, b), seed)


def _normalize(features: Floats) -> Floats:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
