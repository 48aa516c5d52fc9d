"""Metrics against numbers worked out by hand, and intervals against what is known of the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from easyref_core.mrbench import metrics

PICTURES = np.array([[3.0, 4.0], [0.0, 2.0]])
IMAGES = np.array([[1.0, 0.0], [0.0, 5.0], [-6.0, 8.0]])
COSINES = np.array([[0.6, 0.8, 0.28], [0.0, 1.0, 0.8]])  # (3 -6 + 4 8) / (5 10) = 0.28


@pytest.mark.parametrize("metric", [metrics.cosine, metrics.clip_i, metrics.dino_i])
def test_image_similarities_by_hand(metric) -> None:
    np.testing.assert_allclose(metric(PICTURES, IMAGES), COSINES, atol=1e-12)


def test_mean_over_references() -> None:
    np.testing.assert_allclose(metrics.to_references(COSINES), [1.68 / 3, 1.8 / 3])


def test_similarity_to_the_target() -> None:
    np.testing.assert_allclose(metrics.to_target(metrics.clip_i(PICTURES, IMAGES[:1])), [0.6, 0.0])


def test_the_target_is_one() -> None:
    with pytest.raises(ValueError, match="too many values"):
        metrics.to_target(COSINES)


def test_text_cosine_by_hand() -> None:
    np.testing.assert_allclose(
        metrics.clip_t_cosine(PICTURES, np.array([4.0, -3.0])), [0.0, -0.6], atol=1e-12
    )


def test_clip_score_is_scaled_and_never_negative() -> None:
    np.testing.assert_allclose(metrics.clip_score(PICTURES, np.array([0.0, 1.0])), [2.0, 2.5])
    np.testing.assert_allclose(metrics.clip_score(PICTURES, np.array([0.0, -1.0])), [0.0, 0.0])


def test_bootstrap_repeats_with_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert metrics.bootstrap(values, seed=3) == metrics.bootstrap(values, seed=3)
    assert metrics.bootstrap(values, seed=3) != metrics.bootstrap(values, seed=4)


def test_bootstrap_in_chunks_is_the_same(monkeypatch) -> None:
    values = np.random.default_rng(0).normal(size=20)
    whole = metrics.bootstrap(values)
    monkeypatch.setattr(metrics, "CHUNK", 1000)
    assert metrics.bootstrap(values) == whole


def test_bootstrap_of_a_constant_has_no_width() -> None:
    assert metrics.bootstrap(np.full(5, 0.25)) == (0.25, 0.25, 0.25)


def test_one_group_gives_no_interval() -> None:
    mean, low, high = metrics.bootstrap(np.array([0.5]))
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_no_group_gives_no_mean() -> None:
    assert all(map(math.isnan, metrics.bootstrap(np.array([]))))


def test_bootstrap_width_is_that_of_the_mean() -> None:
    """Of 400 normal values the mean's 95 % interval is 2 * 1.96 / 20 = 0.196 wide."""
    _, low, high = metrics.bootstrap(np.random.default_rng(1).normal(size=400))
    assert high - low == pytest.approx(0.196, rel=0.12)


def test_bootstrap_covers_the_truth() -> None:
    """200 samples of 60 exponential values: the interval holds the true mean in about 95 % of them (percentile: less)."""
    samples = np.random.default_rng(2).exponential(size=(200, 60))
    inside = [low <= 1 <= high for _, low, high in (metrics.bootstrap(s, resamples=1000) for s in samples)]
    assert 0.88 <= np.mean(inside) <= 0.98


def test_paired_difference_keeps_pairs_together() -> None:
    a = np.random.default_rng(3).normal(size=50)
    mean, low, high = metrics.paired_difference(a + 0.1, a)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_win_rate_counts_a_tie_one_half() -> None:
    rate = metrics.win_rate(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 0.0]))
    assert rate.mean == 2.5 / 4
    assert 0 <= rate.low <= rate.mean <= rate.high <= 1


def test_win_rates_of_two_methods_add_up_to_one() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 30))
    assert metrics.win_rate(a, b).mean + metrics.win_rate(b, a).mean == pytest.approx(1)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
        metrics.win_rate(np.zeros(3), np.zeros(2))
