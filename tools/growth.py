"""Whether a series of measurements grows: of memory, open files or threads, taken at regular points of a long run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a series changed from its first point to its last, in its own unit, told in two ways.

    trend: the median slope between any two points (Theil-Sen), times the length of the series; quarters: the median of
    its last quarter less that of its first. Neither is moved by single high or low points.
    """

    trend: float
    quarters: float

    @property
    def worst(self) -> float:
        return max(self.trend, self.quarters)


def growth(values: Sequence[float]) -> Growth:
    """The growth of a series of at least 4 points at equal distances."""
    if len(values) < 4:
        raise ValueError(f"There are {len(values)} measurements; growth wants 4 or more. Run for longer.")
    count = len(values)
    slopes = [(values[j] - values[i]) / (j - i) for i in range(count) for j in range(i + 1, count)]
    quarter = max(count // 4, 1)
    return Growth(median(slopes) * (count - 1), median(values[-quarter:]) - median(values[:quarter]))
