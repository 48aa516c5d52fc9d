"""What a part of the benchmark is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line, the same for every part."""

    quick: bool = False  # small shapes and few pairs, for tests: seconds in all
    pairs: int = 5  # interleaved pairs of each comparison
    references: tuple[int, ...] = (1, 2, 4, 8, 16, 112)  # group sizes to encode
    pixels: tuple[int, ...] = (256, 512)  # sides of the pictures that are timed, CFG
    device: str = "cpu"


class Limit(NamedTuple):
    """What is wanted of a row: of its ratio where it has one, else of its value."""

    sign: str  # "<=" or ">="
    bound: float

    def met(self, found: float) -> bool:
        return found <= self.bound if self.sign == "<=" else found >= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure."""

    name: str  # what was measured, with the shapes that matter, and what the ratio is to
    value: float
    unit: str  # of the value: "s", "GiB", "10^9 operations", "%", ...
    ratio: float | None = None  # to the baseline that the name tells
    spread: tuple[float, float] | None = None  # of the pairs' ratios: lower and upper quartile
    wanted: Limit | None = None

    @property
    def met(self) -> bool | None:
        """Whether the figure is as wanted; None where nothing is."""
        if self.wanted is None:
            return None
        return self.wanted.met(self.value if self.ratio is None else self.ratio)
