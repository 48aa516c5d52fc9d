"""The weight schedule: parsing, and its value at a sigma."""

from __future__ import annotations

import math

import pytest

from easyref_core.unet.weight_schedule import Schedule, interpolate, parse_schedule


def percent_to_sigma(percent: float) -> float:
    """Falls from 20 to 0.05; returns what the host returns at exactly 0 and 1."""
    if percent <= 0:
        return 999999999.9
    return 20 * (0.05 / 20) ** percent if percent < 1 else 0.0


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("", []),
        ("0.5", [(0.2, 0.5)]),
        ("1, 0", [(0.2, 1), (0.8, 0)]),
        ("1,0.5,\n0", [(0.2, 1), (0.5, 0.5), (0.8, 0)]),
        ("0.9:2, 0.1:-1", [(0.1, -1), (0.9, 2)]),
    ],
)
def test_points(text: str, points: list) -> None:
    assert parse_schedule(text, 0.2, 0.8) == [pytest.approx(point) for point in points]


def test_line_between_points_and_flat_beyond() -> None:
    points = [(0.2, 1.0), (0.6, 3.0)]
    assert [interpolate(points, at) for at in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([1, 1, 1.5, 3, 3])


@pytest.mark.parametrize("percent", [0.001, 0.25, 0.5, 0.999])
def test_percent_of_a_sigma(percent: float) -> None:
    schedule = Schedule([(0.0, 0.0), (1.0, 1.0)], percent_to_sigma)
    assert schedule.percent(percent_to_sigma(percent)) == pytest.approx(percent, abs=1e-6)
    assert schedule(percent_to_sigma(percent)) == pytest.approx(percent, abs=1e-6)


@pytest.mark.parametrize(("sigma", "percent"), [(1e9, 0.0), (20.0, 0.0), (0.05, 1.0), (0.0, 1.0)])
def test_ends(sigma: float, percent: float) -> None:
    assert Schedule([(0.0, 1.0)], percent_to_sigma).percent(sigma) == pytest.approx(percent, abs=1e-6)


def test_constant_is_exact() -> None:
    schedule = Schedule([(0.0, 0.7), (1.0, 0.7)], percent_to_sigma)
    assert {schedule(sigma) for sigma in (50.0, 3.3, math.pi, 0.01)} == {0.7}
