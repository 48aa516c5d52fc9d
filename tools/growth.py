"""Growth of a series of measurements: of memory, open files or threads, at regular points of a long run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from scipy.stats import theilslopes


class Growth(NamedTuple):
    """Change of a series from its first point to its last, in its own unit, by two estimates.

    trend: Theil-Sen slope times the length. quarters: the median of the last quarter less that of the first.
    Single high or low points move neither.
    """

    trend: float
    quarters: float

    @property
    def worst(self) -> float:
        return max(self)


def growth(values: Sequence[float]) -> Growth:
    """The growth of a series of at least 4 points at equal distances. Raises ValueError for fewer."""
    if len(values) < 4:
        raise ValueError(f"There are {len(values)} measurements; growth wants 4 or more. Run for longer.")
    quarter = len(values) // 4
    trend = float(theilslopes(values).slope) * (len(values) - 1)
    return Growth(trend, median(values[-quarter:]) - median(values[:quarter]))
