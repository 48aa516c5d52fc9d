"""Small charts for previews, drawn with PIL: bars, parts of a whole, and a labelled matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .drawing import INK, MARGIN, PAPER, fit_square, font, heat_colours, shortened

WIDTH = 720  # pixels, of bars and parts
TITLE, TEXT = 22, 18  # font sizes
LINE = 28  # pixels, one line of text
BLUE, RED, GREEN, GREY, FAINT = "#3a6ea5", "#c8402f", "#2f8f4e", "#8c8c8c", "#e6e6e6"
PARTS = ("#3a6ea5", "#e08a1e", "#4b9560", "#8e5ea2", "#c8402f", "#4aa3a8", "#b8a02c", "#6b4a3a")


class Bar(NamedTuple):
    """One bar of a chart; the value's text stands behind it."""

    label: str
    value: float
    text: str
    marked: bool = False
    picture: Image.Image | None = None


def bar_chart(
    title: str, bars: Sequence[Bar], low: float = 0.0, high: float | None = None, mark: str = RED
) -> Image.Image:
    """Bars from left to right, one below the other, from `low` to `high` (the largest value by default).

    mark: the colour of marked bars.
    """
    high = max(bar.value for bar in bars) if high is None else high
    height = 60 if any(bar.picture for bar in bars) else 34
    sheet, draw = _paper(WIDTH, LINE + MARGIN + len(bars) * height, title)
    left = MARGIN + (height + MARGIN if any(bar.picture for bar in bars) else 0)
    label_width = min(200, max(font(TEXT).getlength(bar.label) for bar in bars) + 8)
    text_width = max(font(TEXT).getlength(bar.text) for bar in bars) + 8
    start = left + label_width
    room = WIDTH - MARGIN - text_width - start
    for place, bar in enumerate(bars):
        top = LINE + 2 * MARGIN + place * height
        middle = top + height / 2 - 4
        if bar.picture:
            shown = fit_square(bar.picture, height - 8)
            sheet.paste(
                shown, (MARGIN + (height - 8 - shown.width) // 2, top + (height - 8 - shown.height) // 2)
            )
        draw.text((left, middle), shortened(bar.label, label_width, TEXT), INK, font(TEXT), anchor="lm")
        share = (bar.value - low) / (high - low) if high > low else 0.0
        end = start + max(2.0, room * min(max(share, 0.0), 1.0))
        draw.rectangle((start, middle - 10, start + room, middle + 10), FAINT)
        draw.rectangle((start, middle - 10, end, middle + 10), mark if bar.marked else BLUE)
        draw.text((start + room + 8, middle), bar.text, INK, font(TEXT), anchor="lm")
    return sheet


def parts_chart(title: str, parts: Mapping[str, float], width: int = WIDTH) -> Image.Image:
    """One bar that is divided into parts of a whole (their sum is 1), with a legend below."""
    names = [f"{name} {percent(share)}" for name, share in parts.items()]
    places, lines = _flowing(names, width - 2 * MARGIN)
    sheet, draw = _paper(width, LINE + 30 + 2 * MARGIN + lines * LINE, title)
    top, left = LINE + 2 * MARGIN, float(MARGIN)
    for number, (share, name, (x, line)) in enumerate(zip(parts.values(), names, places, strict=True)):
        colour = PARTS[number % len(PARTS)]
        right = left + share * (width - 2 * MARGIN)
        draw.rectangle((left, top, right, top + 30), colour)
        y = top + 30 + MARGIN + line * LINE
        draw.rectangle((MARGIN + x, y + 3, MARGIN + x + 14, y + 17), colour)
        draw.text((MARGIN + x + 20, y + 10), name, INK, font(TEXT), anchor="lm")
        left = right
    return sheet


def matrix_chart(
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    note: str = "",
    pictures: Sequence[Image.Image] | None = None,
    marked: int = -1,
) -> Image.Image:
    """A heat map (rows, columns) with a label at each row and column and a scale of colours below.

    NaN is grey. pictures: of the columns, above their labels. marked: the number of a row and column in red.
    note: what the colours mean.
    """
    count = values.shape[1]
    cell = int(np.clip(576 / count, 18, 64))
    label_width = int(max(font(TEXT).getlength(row) for row in rows)) + MARGIN
    every = max(1, -(-int(max(font(TEXT).getlength(column) for column in columns) + 6) // cell))
    head = cell if pictures else 0
    width = max(
        label_width + count * cell + 2 * MARGIN,
        int(font(TITLE).getlength(title)) + 2 * MARGIN,
        int(font(TEXT).getlength(note)) + 2 * MARGIN,
        360,
    )
    height = LINE + head + LINE + len(rows) * cell + 2 * LINE + MARGIN
    sheet, draw = _paper(width, height, title)
    left, top = MARGIN + label_width, LINE + MARGIN + head + LINE
    for number, column in enumerate(columns):
        x = left + number * cell
        if pictures:
            shown = fit_square(pictures[number], cell - 4)
            sheet.paste(shown, (x + (cell - shown.width) // 2, top - LINE - 2 - shown.height))
        if number % every == 0:
            colour = RED if number == marked else INK
            draw.text((x + cell / 2, top - LINE / 2), column, colour, font(TEXT), anchor="mm")
    for number, row in enumerate(rows):
        colour = RED if number == marked else INK
        draw.text((left - 8, top + (number + 0.5) * cell), row, colour, font(TEXT), anchor="rm")
    _cells(draw, values, (left, top), cell, low, high)
    _scale(sheet, draw, (left, top + len(rows) * cell + MARGIN), low, high)
    draw.text((MARGIN, top + len(rows) * cell + MARGIN + LINE), note, GREY, font(TEXT))
    return sheet


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cells(
    draw: ImageDraw.ImageDraw,
    values: np.ndarray,
    corner: tuple[int, int],
    cell: int,
    low: float,
    high: float,
) -> None:
    left, top = corner
    scaled = ((values - low) / (high - low or 1.0)).clip(0, 1)
    for (row, column), share in np.ndenumerate(scaled):
        x, y = left + column * cell, top + row * cell
        if np.isnan(share):
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), FAINT)
            continue
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), tuple(heat_colours(share).tolist()))
        if cell >= 44:
            colour = PAPER if share < 0.6 else INK
            text = f"{values[row, column]:.2f}"
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), text, colour, font(TEXT), anchor="mm")


def _scale(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], low: float, high: float
) -> None:
    left, top = corner
    band = heat_colours(np.linspace(0, 1, 160))[None].repeat(14, axis=0)
    first, last = f"{low:.2f}", f"{high:.2f}"
    draw.text((left, top + 7), first, INK, font(TEXT), anchor="lm")
    start = left + int(font(TEXT).getlength(first)) + 8
    sheet.paste(Image.fromarray(band), (start, top))
    draw.text((start + 168, top + 7), last, INK, font(TEXT), anchor="lm")


def _flowing(names: Sequence[str], width: float) -> tuple[list[tuple[float, int]], int]:
    """Where each entry of a legend stands, (pixels from the left, line), and how many lines there are."""
    places, left, line = [], 0.0, 0
    for name in names:
        length = font(TEXT).getlength(name) + 44
        if left and left + length > width:
            left, line = 0.0, line + 1
        places.append((left, line))
        left += length
    return places, line + 1


def _paper(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (int(width), int(height + 2 * MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), shortened(title, width - 2 * MARGIN, TITLE), INK, font(TITLE))
    return sheet, draw
