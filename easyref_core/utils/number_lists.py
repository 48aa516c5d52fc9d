"""Parsers of lists in text inputs: numbers, pairs, and references of a group.

    numbers      1, 0.5, 0
    pairs        0.2:1, 0.8:0     spaces around the colon are allowed
    references   3, 1-2           whole numbers from 1, ranges, and "all"

Commas, semicolons, spaces, tabs and line breaks separate entries; several in a row count as one. Full-width
digits and signs, which input methods for Chinese and Japanese type, count as their ASCII forms.

A decimal has a point. `0,5` may be one half with a decimal comma, or 0 and 5, so it is an error. In general,
a comma directly before a digit is an error, unless it can only be a separator:

    1, 0.5, 0     a space follows the comma
    1,0.5,0       a number joined to it by commas has a decimal point
    3:1,6:0.5     every entry is a pair, and a number cannot span two pairs
    1,2,3         in a list of references, which are whole numbers

A full-width comma is not a decimal comma.
"""

from __future__ import annotations

import math
import re
from itertools import chain

from .errors import shorten

_WIDTH = 0xFEE0  # from the code of an ASCII character to that of its full-width form
_FULL_WIDTH = {_WIDTH + ord(plain): plain for plain in "0123456789.;:+-~"}
_DASHES = {0x2212: "-", 0x2013: "-"}  # minus sign, en dash
# A full-width or ideographic comma becomes a comma with a space, because it is not a decimal comma.
_COMMAS = {_WIDTH + ord(","): ", ", 0x3001: ", "}
_TO_ASCII = _FULL_WIDTH | _DASHES | _COMMAS
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_SEPARATORS = re.compile(r"[\s,;]+")
_RUN_ENDS = re.compile(r"[\s;]+")
_DECIMAL_COMMA = re.compile(r"(?<![\d.])([+-]?\d*),(\d+)(?![\d.])", re.ASCII)
ALL = "all"


def parse_numbers(
    text: str, name: str, low: float = -math.inf, high: float = math.inf, example: str = "1, 0.5, 0"
) -> list[float]:
    """Parse a list of finite numbers from `low` to `high`; [] for an empty text.

    name, example: the input and a valid list, for the errors.
    Raises ValueError for anything else, and for a comma that may be a decimal comma.
    """
    entries = split_entries(text, name)
    example = f'numbers, as in "{example}"'
    return [parse_number(entry, name, low, high, example=example) for entry in entries]


def parse_number(
    entry: str, name: str, low: float = -math.inf, high: float = math.inf, *, example: str
) -> float:
    """Parse one number of a list. Raises ValueError unless it is finite and from `low` to `high`."""
    number = float(entry) if _NUMBER.fullmatch(entry) else math.nan
    if math.isfinite(number) and low <= number <= high:
        return number
    bounds = "" if math.isinf(low) and math.isinf(high) else f", from {low:g} to {high:g}"
    raise ValueError(f"{name} has {shorten(repr(entry))} where a number is wanted{bounds}. Write {example}.")


def parse_references(text: str, name: str, count: int, most: int) -> list[int]:
    """Parse references of a group of `count`, such as "3, 1-2, all", in order; [] for an empty text.

    A range may fall: 3-1 is 3, 2, 1. Raises ValueError for anything else, and for more than `most` of them.
    """
    ranges = [_reference_range(entry, name, count) for entry in split_entries(text, name, integers=True)]
    total = sum(map(len, ranges))
    if total > most:
        raise ValueError(f"{name} names {total:,} references; wanted at most {most:,}. Shorten the list.")
    return list(chain.from_iterable(ranges))


def parse_reference_weights(text: str, name: str, count: int) -> list[float]:
    """Parse weights of a group's references: one number each, or pairs "2:0.5, 4-6:0" and 1 for all others.

    An empty text gives 1 for each of the `count` references. Raises ValueError for anything else, but not for
    a wrong number of weights or weights out of bounds: ContextStates.weighed checks those.
    """
    entries = split_entries(text, name)
    example = 'one number for each reference, as in "1, 0.5, 1", or reference:weight pairs, as in "2:0.5"'
    if not entries:
        return [1.0] * count
    if not require_alike(entries, name, "reference:weight", example):
        return [parse_number(entry, name, example=example) for entry in entries]
    weights: dict[int, float] = {}
    for entry in entries:
        references, _, number = entry.partition(":")
        weight = parse_number(number, name, example=example)
        for reference in _reference_range(references, name, count):
            if reference in weights:
                raise ValueError(f"{name} names reference {reference} twice. Name each reference once.")
            weights[reference] = weight
    return [weights.get(reference, 1.0) for reference in range(1, count + 1)]


def split_entries(text: str, name: str, *, integers: bool = False) -> list[str]:
    """Split a list into entries in ASCII, a pair as "a:b" without spaces.

    integers: the list holds integers, so that no comma is a decimal comma, and ranges "1 - 3" lose their
    spaces. Raises ValueError for a comma that may be a decimal comma.
    """
    text = _strip_around(":", text.translate(_TO_ASCII))
    if integers:
        text = _strip_around("-", text.replace("~", "-"))
    entries = [entry for entry in _SEPARATORS.split(text) if entry]
    pairs = sum(":" in entry for entry in entries)
    if not integers and pairs < len(entries):
        for run in _RUN_ENDS.split(text):
            _refuse_decimal_comma(run, name, mixed=pairs > 0)
    return entries


def require_alike(entries: list[str], name: str, kind: str, example: str) -> bool:
    """Return True if the entries are pairs. Raises ValueError for a list of both numbers and pairs."""
    paired = {":" in entry for entry in entries}
    if len(paired) > 1:
        raise ValueError(
            f"{name} {shorten(repr(', '.join(entries)))} mixes numbers and {kind} pairs. Write either "
            f"{example}."
        )
    return paired == {True}


def _strip_around(sign: str, text: str) -> str:
    """Remove the spaces around a sign."""
    return sign.join(part.strip() for part in text.split(sign)) if sign in text else text


def _refuse_decimal_comma(run: str, name: str, mixed: bool) -> None:
    """Raise ValueError if a comma of a run, which holds no space, may be a decimal comma.

    mixed: only some entries are pairs, which a decimal comma may explain even if the run has a decimal point.
    """
    comma = _DECIMAL_COMMA.search(run)
    if comma is None or (not mixed and re.search(r"[.eE]", run)):
        return
    integer, fraction = comma.groups()
    decimal = f"{integer if integer.strip('+-') else integer + '0'}.{fraction}"
    listed = "; ".join(filter(None, run.split(",")))
    raise ValueError(
        f"{name} has {shorten(repr(run.strip(',')))}, where a comma may be a decimal comma. Write decimals "
        f"with a point, as in {shorten(decimal)}, and separate numbers by semicolons or by commas with a "
        f"space, as in {shorten(listed)}."
    )


def _reference_range(entry: str, name: str, count: int) -> range:
    """Parse an entry of a list of references: "2", "1-3", "3-1" or "all"."""
    if entry.lower() == ALL:
        return range(1, count + 1)
    first, dash, last = entry.partition("-")
    start = _reference(first, entry, name, count)
    end = _reference(last, entry, name, count) if dash else start
    return range(start, end + 1) if start <= end else range(start, end - 1, -1)


def _reference(text: str, entry: str, name: str, count: int) -> int:
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if 1 <= number <= count and number == int(number):
        return int(number)
    raise ValueError(
        f"{name} has {shorten(repr(entry))}, and there is no such reference in a group of {count}. Write "
        f"whole numbers from 1 to {count}, ranges such as 1-{count}, or {ALL}."
    )
