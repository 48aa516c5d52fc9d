"""Growth distinguishes a leak from noise."""

from __future__ import annotations

import random

from tools.growth import growth


def test_noise_is_not_growth() -> None:
    noise = random.Random(0)
    assert abs(growth([500 + noise.random() for _ in range(15)]).worst) < 1


def test_leak_is_growth_and_a_peak_is_not() -> None:
    assert growth([500 + i for i in range(15)]) == (14, 12)
    assert growth([500] * 7 + [900] + [500] * 7).worst == 0
