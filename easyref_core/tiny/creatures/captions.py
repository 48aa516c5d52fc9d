"""Captions of images of creatures: they name place, ground and number, and never an identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from .images import GROUNDS, PLACES

GROUND_NAMES, PLACE_NAMES = tuple(GROUNDS), tuple(PLACES)
NAMES = ("ground", "place")
COUNTS = ("a creature", "two creatures", "three creatures")


def caption(count: int, ground: int | None, place: int | None = None) -> str:
    """A caption such as "a creature on sand at the left"; None leaves out."""
    return f"{COUNTS[count - 1]}{words(ground, place)}"


def words(ground: int | None, place: int | None) -> str:
    """The words of a caption after the creatures, such as " on sand at the left"."""
    on = "" if ground is None else f" on {GROUND_NAMES[ground]}"
    return on if place is None else f"{on} at the {PLACE_NAMES[place]}"


def all_captions() -> Iterator[str]:
    """Every caption."""
    grounds: Iterable[int | None] = (None, *range(len(GROUNDS)))
    places: Iterable[int | None] = (None, *range(len(PLACES)))
    for count, ground, place in product(COUNTS, grounds, places):
        yield f"{count}{words(ground, place)}"
