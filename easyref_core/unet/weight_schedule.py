"""The weight schedule: a curve over the denoising, evaluated at a step's sigma."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..utils.errors import MAX_FACTOR, shorten
from ..utils.number_lists import parse_number, require_alike, split_entries

NAME = "weight_schedule"
EXAMPLE = 'numbers, as in "1, 0.5, 0", or percent:weight pairs, as in "0.2:1, 0.8:0"'
STEPS = 999  # intervals between SDXL's 1000 timesteps; log sigma is linear in the percent in between
MARGIN = 1e-9  # percent_to_sigma returns no sigma of the schedule at exactly 0 and 1

Point = tuple[float, float]  # (fraction of the denoising 0..1, factor)


def parse_schedule(text: str, start: float, end: float) -> list[Point]:
    """Points (percent, weight), by rising percent for "1, 0.5, 0" (from start to end) or "0.2:1, 0.8:0".

    An empty text gives no points. number_lists.py parses the text. Raises ValueError for a text that is
    neither, for weights beyond MAX_FACTOR, and for percents outside 0..1 or listed twice.
    """
    entries = split_entries(text, NAME)
    paired = require_alike(entries, NAME, "percent:weight", EXAMPLE)
    if paired:
        points = sorted(tuple(_number(part) for part in entry.split(":", 1)) for entry in entries)
    else:
        last = max(len(entries) - 1, 1)
        points = [(start + (end - start) * i / last, _number(entry)) for i, entry in enumerate(entries)]
    percents = [percent for percent, _ in points]
    if any(not 0 <= percent <= 1 for percent in percents):
        raise ValueError(
            f"weight_schedule {shorten(repr(text))} names a percent outside 0 to 1. Write 0.5 for half of "
            "the denoising."
        )
    if paired and len(set(percents)) < len(percents):
        raise ValueError(f"weight_schedule {shorten(repr(text))} names a percent twice. Name each once.")
    return points


def _number(text: str) -> float:
    return parse_number(text, NAME, -MAX_FACTOR, MAX_FACTOR, example=EXAMPLE)


def interpolate(points: list[Point], at: float) -> float:
    """The value at `at` of the line through points (x rising, value); beyond the ends, the ends' values."""
    following, end = 0, len(points)
    while following < end:  # bisection, written out because torch.compile cannot trace the bisect module
        middle = (following + end) // 2
        following, end = (middle + 1, end) if points[middle][0] < at else (following, middle)
    if following == 0:
        return points[0][1]
    if following == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[following - 1], points[following]
    return y1 if at == x1 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)


class Schedule:
    """The factor at a step's sigma. The sigmas are looked up at construction; a call uses no tensor."""

    def __init__(self, points: list[Point], percent_to_sigma: Callable[[float], float]) -> None:
        """points: at least one, by rising percent. percent_to_sigma: falls from first to last sigma."""
        self.points = points
        percents = [step / STEPS for step in range(STEPS, -1, -1)]
        clamped = [min(max(percent, MARGIN), 1 - MARGIN) for percent in percents]
        sigmas = [float(percent_to_sigma(percent)) for percent in clamped]
        self._percents = [(math.log(sigma), percent) for sigma, percent in zip(sigmas, percents, strict=True)]

    def percent(self, sigma: float) -> float:
        """Fraction of the denoising that is done at this sigma, 0..1."""
        if sigma <= 0:
            return 1.0
        return interpolate(self._percents, math.log(sigma))

    def __call__(self, sigma: float) -> float:
        return interpolate(self.points, self.percent(sigma))
