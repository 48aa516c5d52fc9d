"""MRBench metrics and bootstrap intervals, as pure functions of features and scores.

N images, M images to compare with, D the width of a feature, G groups. Features need not be normalised.
CLIP-I and DINO-I are `cosine` of CLIP image features and of DINO's CLS tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

CLIP_SCORE_SCALE = 2.5  # CLIPScore (arXiv 2104.08718), equation 1
RESAMPLES = 10_000
LEVEL = 0.95
BATCH = 1000  # resamples in memory at once


class Interval(NamedTuple):
    """A mean and its confidence interval; both ends are NaN for fewer than two topics."""

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


def bootstrap(
    values: Floats,
    topics: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Mean of one value per group, and its percentile bootstrap interval over topics and training seeds.

    Groups of a topic resemble each other, so topics are resampled and all groups of a drawn topic counted.
    Each axis of training seeds is resampled by itself, independently of the topics. Percentile intervals of
    few units are too narrow: at a nominal 95 %, 20 topics cover about 92 %, and where training seeds differ
    more than topics, three of them cover about 72 % (tests/mrbench/test_metrics.py simulates both).

    Args:
        values: (G,), or (S, G) for S training seeds, or more axes of seeds before the last.
        topics: the topic of each group; by default every group has its own.
    """
    values = np.asarray(values, dtype=np.float64)
    *seeds, groups = values.shape
    positions = _positions(range(groups) if topics is None else topics)
    counts = np.bincount(positions)
    mean = float(values.mean()) if values.size else np.nan
    if len(counts) < 2:
        return Interval(mean, np.nan, np.nan)
    sums = np.stack([np.bincount(positions, row) for row in values.reshape(-1, groups)])  # (seeds, topics)
    topic_rng, seed_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    means = []
    for start in range(0, resamples, BATCH):
        size = min(BATCH, resamples - start)
        drawn = topic_rng.integers(len(counts), size=(size, len(counts)))
        of_topics = _draw_seeds(seeds, size, seed_rng) @ sums  # -> (size, topics)
        totals = np.take_along_axis(of_topics, drawn, axis=1).sum(axis=1)
        means.append(totals / counts[drawn].sum(axis=1))
    tail = (1 - level) / 2
    low, high = np.percentile(np.concatenate(means), [100 * tail, 100 * (1 - tail)])
    return Interval(mean, float(low), float(high))


def paired_difference(a: Floats, b: Floats, topics: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """Mean of a - b, each (G,) or (seeds, G). Pairs stay together: topics are drawn for both at once.

    The training seeds of a and of b are drawn independently.
    """
    return bootstrap(np.subtract(*_pairs(a, b)), topics, seed)


def win_rate(a: Floats, b: Floats, topics: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """Fraction of the groups in which a is greater than b, resampled as by `paired_difference`.

    A tie counts one half. With several training seeds, every seed of a is compared with every seed of b.
    """
    return bootstrap((1 + np.sign(np.subtract(*_pairs(a, b)))) / 2, topics, seed)


def _pairs(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Scores (G,) or (seeds, G) of two methods -> (seeds of a, 1, G) and (1, seeds of b, G)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"Paired scores have shapes {a.shape} and {b.shape}; wanted one score of each for every group."
        )
    return np.atleast_2d(a)[:, None], np.atleast_2d(b)[None]


def _positions(topics: Iterable[Hashable]) -> NDArray[np.intp]:
    """Number of each group's topic, in the order in which topics first appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(topic, len(numbers)) for topic in topics], dtype=np.intp)


def _draw_seeds(axes: Sequence[int], size: int, rng: np.random.Generator) -> Floats:
    """Weights of the seeds in `size` resamples, (size, product of the axes); each row sums to 1."""
    weights = np.ones((size, 1))
    for length in axes:
        drawn = rng.multinomial(length, np.full(length, 1 / length), size=size) / length
        weights = (weights[:, :, None] * drawn[:, None]).reshape(size, -1)
    return weights


def _normalize(features: Floats) -> Floats:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
