"""Small charts, drawn with PIL: bars, a stacked bar, and a labelled matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .drawing import INK, MARGIN, PAPER, apply_colormap, fit_square, font, shorten_line

WIDTH = 720  # pixels, of bar charts
TITLE, TEXT = 22, 18  # font sizes
LINE = 28  # pixels, one line of text
BLUE, RED, GREEN, GREY, FAINT = "#3a6ea5", "#c8402f", "#2f8f4e", "#8c8c8c", "#e6e6e6"
PALETTE = ("#3a6ea5", "#e08a1e", "#4b9560", "#8e5ea2", "#c8402f", "#4aa3a8", "#b8a02c", "#6b4a3a")


class Bar(NamedTuple):
    """One bar of a chart, with its value as text to its right."""

    label: str
    value: float
    text: str
    highlight: bool = False
    image: Image.Image | None = None


def bar_chart(
    title: str, bars: Sequence[Bar], low: float = 0.0, high: float | None = None, highlight: str = RED
) -> Image.Image:
    """Draw horizontal bars from `low` to `high` (by default the largest value), one below the other.

    highlight: the colour of highlighted bars.
    """
    high = max(bar.value for bar in bars) if high is None else high
    height = 60 if any(bar.image for bar in bars) else 34
    sheet, draw = _blank_chart(WIDTH, LINE + MARGIN + len(bars) * height, title)
    left = MARGIN + (height + MARGIN if any(bar.image for bar in bars) else 0)
    label_width = min(200, max(font(TEXT).getlength(bar.label) for bar in bars) + 8)
    text_width = max(font(TEXT).getlength(bar.text) for bar in bars) + 8
    start = left + label_width
    length = WIDTH - MARGIN - text_width - start
    for i, bar in enumerate(bars):
        top = LINE + 2 * MARGIN + i * height
        middle = top + height / 2 - 4
        if bar.image:
            icon = fit_square(bar.image, height - 8)
            sheet.paste(
                icon, (MARGIN + (height - 8 - icon.width) // 2, top + (height - 8 - icon.height) // 2)
            )
        draw.text((left, middle), shorten_line(bar.label, label_width, TEXT), INK, font(TEXT), anchor="lm")
        fraction = (bar.value - low) / (high - low) if high > low else 0.0
        end = start + max(2.0, length * min(max(fraction, 0.0), 1.0))
        draw.rectangle((start, middle - 10, start + length, middle + 10), FAINT)
        draw.rectangle((start, middle - 10, end, middle + 10), highlight if bar.highlight else BLUE)
        draw.text((start + length + 8, middle), bar.text, INK, font(TEXT), anchor="lm")
    return sheet


def stacked_bar(title: str, shares: Mapping[str, float], width: int = WIDTH) -> Image.Image:
    """Draw one bar divided into shares that sum to 1, with a legend below."""
    entries = [f"{name} {percent(share)}" for name, share in shares.items()]
    positions, lines = _wrap_legend(entries, width - 2 * MARGIN)
    sheet, draw = _blank_chart(width, LINE + 30 + 2 * MARGIN + lines * LINE, title)
    top, left = LINE + 2 * MARGIN, float(MARGIN)
    for i, (share, entry, (x, line)) in enumerate(zip(shares.values(), entries, positions, strict=True)):
        colour = PALETTE[i % len(PALETTE)]
        right = left + share * (width - 2 * MARGIN)
        draw.rectangle((left, top, right, top + 30), colour)
        y = top + 30 + MARGIN + line * LINE
        draw.rectangle((MARGIN + x, y + 3, MARGIN + x + 14, y + 17), colour)
        draw.text((MARGIN + x + 20, y + 10), entry, INK, font(TEXT), anchor="lm")
        left = right
    return sheet


def matrix_chart(
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    note: str = "",
    images: Sequence[Image.Image] | None = None,
    highlight: int = -1,
) -> Image.Image:
    """Draw values (rows, columns) as a heat map with labels and a colour bar; NaN is grey.

    images: one above each column's label. highlight: index of the row and column labelled in red. note:
    meaning of the colours.
    """
    cell = int(np.clip(576 / len(columns), 18, 64))
    label_width = int(max(font(TEXT).getlength(row) for row in rows)) + MARGIN
    head = cell if images else 0
    widths = [label_width + len(columns) * cell, font(TITLE).getlength(title), font(TEXT).getlength(note)]
    width = max(*(int(content) + 2 * MARGIN for content in widths), 360)
    height = LINE + head + LINE + len(rows) * cell + 2 * LINE + MARGIN
    sheet, draw = _blank_chart(width, height, title)
    left, top = MARGIN + label_width, LINE + MARGIN + head + LINE
    label_every = max(1, -(-int(max(font(TEXT).getlength(column) for column in columns) + 6) // cell))
    for i, column in enumerate(columns):
        x = left + i * cell
        if images:
            icon = fit_square(images[i], cell - 4)
            sheet.paste(icon, (x + (cell - icon.width) // 2, top - LINE - 2 - icon.height))
        if i % label_every == 0:
            colour = RED if i == highlight else INK
            draw.text((x + cell / 2, top - LINE / 2), column, colour, font(TEXT), anchor="mm")
    for i, row in enumerate(rows):
        colour = RED if i == highlight else INK
        draw.text((left - 8, top + (i + 0.5) * cell), row, colour, font(TEXT), anchor="rm")
    normalized = ((values - low) / (high - low or 1.0)).clip(0, 1)
    _draw_cells(draw, values, normalized, (left, top), cell)
    bottom = top + len(rows) * cell + MARGIN
    _draw_color_bar(sheet, draw, (left, bottom), f"{low:.2f}", f"{high:.2f}")
    draw.text((MARGIN, bottom + LINE), note, GREY, font(TEXT))
    return sheet


def percent(share: float) -> str:
    """Return a share in 0..1 as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def _draw_cells(
    draw: ImageDraw.ImageDraw, values: np.ndarray, normalized: np.ndarray, corner: tuple[int, int], cell: int
) -> None:
    left, top = corner
    for (row, column), level in np.ndenumerate(normalized):
        x, y = left + column * cell, top + row * cell
        if np.isnan(level):
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), FAINT)
            continue
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), tuple(apply_colormap(level).tolist()))
        if cell >= 44:
            colour = PAPER if level < 0.6 else INK
            text = f"{values[row, column]:.2f}"
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), text, colour, font(TEXT), anchor="mm")


def _draw_color_bar(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], low: str, high: str
) -> None:
    left, top = corner
    band = apply_colormap(np.linspace(0, 1, 160))[None].repeat(14, axis=0)
    draw.text((left, top + 7), low, INK, font(TEXT), anchor="lm")
    start = left + int(font(TEXT).getlength(low)) + 8
    sheet.paste(Image.fromarray(band), (start, top))
    draw.text((start + 168, top + 7), high, INK, font(TEXT), anchor="lm")


def _wrap_legend(entries: Sequence[str], width: float) -> tuple[list[tuple[float, int]], int]:
    """Return the position of each legend entry, (pixels from the left, line), and the number of lines."""
    positions, left, line = [], 0.0, 0
    for entry in entries:
        length = font(TEXT).getlength(entry) + 44
        if left and left + length > width:
            left, line = 0.0, line + 1
        positions.append((left, line))
        left += length
    return positions, line + 1


def _blank_chart(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (int(width), int(height + 2 * MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), shorten_line(title, width - 2 * MARGIN, TITLE), INK, font(TITLE))
    return sheet, draw
