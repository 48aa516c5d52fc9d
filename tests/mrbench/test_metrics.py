"""Metrics against numbers computed by hand, and intervals against known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from easyref_core.mrbench import metrics

IMAGES = np.array([[3.0, 4.0], [0.0, 2.0]])
OTHERS = np.array([[1.0, 0.0], [0.0, 5.0], [-6.0, 8.0]])
COSINES = np.array([[0.6, 0.8, 0.28], [0.0, 1.0, 0.8]])  # (3 -6 + 4 8) / (5 10) = 0.28


def test_similarities_by_hand() -> None:
    np.testing.assert_allclose(metrics.cosine(IMAGES, OTHERS), COSINES, atol=1e-12)
    np.testing.assert_allclose(metrics.to_references(COSINES), [1.68 / 3, 1.8 / 3])
    np.testing.assert_allclose(metrics.to_target(metrics.cosine(IMAGES, OTHERS[:1])), [0.6, 0.0])
    np.testing.assert_allclose(metrics.clip_t_cosine(IMAGES, np.array([4.0, -3.0])), [0, -0.6], atol=1e-12)


def test_two_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="too many values"):
        metrics.to_target(COSINES)


def test_clip_score_is_scaled_and_not_negative() -> None:
    np.testing.assert_allclose(metrics.clip_score(IMAGES, np.array([0.0, 1.0])), [2.0, 2.5])
    np.testing.assert_allclose(metrics.clip_score(IMAGES, np.array([0.0, -1.0])), [0.0, 0.0])


def test_bootstrap_is_repeatable() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert metrics.bootstrap(values, seed=3) == metrics.bootstrap(values, seed=3)
    assert metrics.bootstrap(values, seed=3) != metrics.bootstrap(values, seed=4)


def test_bootstrap_is_the_percentile_interval_of_resampled_means() -> None:
    """The intervals in docs/mrbench_tiny were computed so, by `scipy.stats.bootstrap`."""
    values = np.random.default_rng(0).normal(size=20)
    means = values[np.random.default_rng(3).integers(20, size=(metrics.RESAMPLES, 20))].mean(axis=1)
    expected = (values.mean(), *np.quantile(means, [0.025, 0.975]))
    assert metrics.bootstrap(values, seed=3) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_of_a_constant_has_no_width() -> None:
    assert metrics.bootstrap(np.full(5, 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("values", "mean"), [([0.5], 0.5), ([], math.nan)])
def test_fewer_than_two_groups_give_no_interval(values: list[float], mean: float) -> None:
    assert metrics.bootstrap(np.array(values)) == pytest.approx((mean, math.nan, math.nan), nan_ok=True)


def test_bootstrap_width_is_that_of_the_mean() -> None:
    """The mean's 95 % interval of 400 normal values is 2 * 1.96 / 20 = 0.196 wide."""
    _, low, high = metrics.bootstrap(np.random.default_rng(1).normal(size=400))
    assert high - low == pytest.approx(0.196, rel=0.12)


def test_bootstrap_covers_the_truth() -> None:
    """The interval of 60 exponential values covers the true mean in about 95 % of 200 samples."""
    samples = np.random.default_rng(2).exponential(size=(200, 60))
    inside = [low <= 1 <= high for _, low, high in (metrics.bootstrap(s, resamples=1000) for s in samples)]
    assert 0.88 <= np.mean(inside) <= 0.98


TOPICS = [str(i // 5) for i in range(100)]  # 20 topics of 5 groups


def coverage(samples: np.ndarray, topics: list[str] | None) -> float:
    """Fraction of the samples whose nominal 95 % interval covers their true mean, 0."""
    intervals = [metrics.bootstrap(sample, topics, resamples=500) for sample in samples]
    return float(np.mean([low <= 0 <= high for _, low, high in intervals]))


def topic_samples(count: int, seed_effect: float | None = None) -> np.ndarray:
    """Samples of 100 groups whose topics differ (deviation 1) more than the groups of a topic (0.8).

    seed_effect: deviation of three training seeds; None gives values without that axis.
    """
    rng, seeds = np.random.default_rng(4), () if seed_effect is None else (3,)
    topics = rng.normal(size=(count, *(1 for _ in seeds), 20)).repeat(5, axis=-1)
    values = topics + 0.8 * rng.normal(size=(count, *seeds, 100))
    return values if seed_effect is None else values + seed_effect * rng.normal(size=(count, 3, 1))


def test_resampled_topics_cover_the_truth_and_resampled_groups_do_not() -> None:
    """Groups of a topic resemble each other, so resampling groups is too sure of itself."""
    samples = topic_samples(400)
    assert 0.64 <= coverage(samples, None) <= 0.77
    assert 0.90 <= coverage(samples, TOPICS) <= 0.97


@pytest.mark.parametrize(
    ("seed_effect", "low", "high"),
    [(0.0, 0.90, 0.98), (0.25, 0.88, 0.97), (1.0, 0.74, 0.87), (3.0, 0.63, 0.79)],
)
def test_three_training_seeds_cover_less_the_more_they_differ(
    seed_effect: float, low: float, high: float
) -> None:
    """Three seeds are too few for a percentile interval: about 0.72 where they differ most."""
    assert low <= coverage(topic_samples(250, seed_effect), TOPICS) <= high


def test_one_group_per_topic_equals_a_bootstrap_of_groups() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert metrics.bootstrap(values, list("abcdefghijklmnopqrst")) == metrics.bootstrap(values)


def test_one_training_seed_equals_a_bootstrap_of_topics() -> None:
    values = np.random.default_rng(0).normal(size=100)
    assert metrics.bootstrap(values[None], TOPICS) == metrics.bootstrap(values, TOPICS)
    a, b = values, values[::-1]
    assert metrics.win_rate(a[None], b[None], TOPICS) == metrics.win_rate(a, b, TOPICS)


def test_topics_of_unequal_size_count_by_their_groups() -> None:
    """Topics a: 0 0 0, b: 1. Resamples are aa (0), ab (1/4), bb (1)."""
    mean, low, high = metrics.bootstrap(np.array([0.0, 0, 0, 1]), list("aaab"))
    assert (mean, low, high) == (0.25, 0, 1)


def test_one_topic_gives_no_interval() -> None:
    assert metrics.bootstrap(np.arange(4.0), ["a"] * 4) == pytest.approx(
        (1.5, math.nan, math.nan), nan_ok=True
    )


def test_training_seeds_of_a_pair_are_drawn_independently() -> None:
    """Without any difference between groups, only the seeds of each method vary."""
    a, b = np.zeros((2, 30)), np.zeros((2, 30))
    a[1], b[1] = 1, 1
    mean, low, high = metrics.paired_difference(a, b)
    assert (mean, low, high) == (0, -1, 1)  # both at 0 and 1 would give no width
    assert metrics.win_rate(a, b).mean == 0.5


def test_paired_difference_keeps_pairs_together() -> None:
    a = np.random.default_rng(3).normal(size=50)
    assert metrics.paired_difference(a + 0.1, a) == pytest.approx((0.1, 0.1, 0.1))


def test_win_rate_counts_a_tie_one_half() -> None:
    rate = metrics.win_rate(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 0.0]))
    assert rate.mean == 2.5 / 4
    assert 0 <= rate.low <= rate.mean <= rate.high <= 1


def test_win_rates_of_two_methods_add_up_to_one() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 30))
    assert metrics.win_rate(a, b).mean + metrics.win_rate(b, a).mean == pytest.approx(1)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
        metrics.win_rate(np.zeros(3), np.zeros(2))
