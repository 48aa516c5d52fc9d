"""Small charts, drawn with PIL: bars, a stacked bar, and a labelled matrix, each with its scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .colors import BLUE, FAINT, GREY, INK, PAPER, RED, apply_colormap, contrast, series_colors
from .drawing import MARGIN, draw_upward, fit_square, font, shorten_line, vstack
from .scales import AXIS_HEIGHT, LINE, TEXT, Scale, color_bar, draw_axis

WIDTH = 720  # pixels, of bar charts
TITLE = 24  # font size
LABEL_WIDTH = 240  # pixels, maximum
FRAME = 3  # pixels, around what is highlighted
THICKNESS = 30  # pixels, of a stacked bar


class Bar(NamedTuple):
    """One bar of a chart, with its value as text to its right."""

    label: str
    value: float
    text: str
    highlight: bool = False
    image: Image.Image | None = None


class Labels(NamedTuple):
    """Labels of the rows or columns of a matrix, and the title of that axis."""

    title: str
    names: Sequence[str]

    @property
    def width(self) -> int:
        """Width of the longest name in pixels."""
        return int(max(font(TEXT).getlength(name) for name in self.names))


def bar_chart(title: str, bars: Sequence[Bar], scale: Scale, highlight: str = RED) -> Image.Image:
    """Draw horizontal bars on a scale, one below the other.

    highlight: the colour of highlighted bars, and of the frames around their images.
    """
    height = 64 if any(bar.image for bar in bars) else 36
    top = MARGIN + LINE + MARGIN
    sheet, draw = _blank_chart(WIDTH, top + len(bars) * height + AXIS_HEIGHT, title)
    left = MARGIN + (height + MARGIN if any(bar.image for bar in bars) else 0)
    label_width = min(LABEL_WIDTH, max(font(TEXT).getlength(bar.label) for bar in bars) + 8)
    text_width = max(font(TEXT).getlength(bar.text) for bar in bars) + 8
    start = left + label_width
    length = WIDTH - MARGIN - text_width - start
    for i, bar in enumerate(bars):
        y = top + i * height
        middle, colour = y + height / 2 - 4, highlight if bar.highlight else BLUE
        if bar.image:
            _paste_icon(sheet, bar.image, (MARGIN, y, height - 8), colour if bar.highlight else None)
        ink = highlight if bar.highlight else INK
        draw.text((left, middle), shorten_line(bar.label, label_width, TEXT), ink, font(TEXT), anchor="lm")
        end = start + max(2.0, length * scale.position(bar.value))
        draw.rectangle((start, middle - 11, start + length, middle + 11), FAINT)
        draw.rectangle((start, middle - 11, end, middle + 11), colour)
        draw.text((start + length + 8, middle), bar.text, INK, font(TEXT), anchor="lm")
    draw_axis(sheet, scale, start, top + len(bars) * height, length)
    return sheet


def stacked_bar(title: str, shares: Mapping[str, float], scale_title: str, width: int = WIDTH) -> Image.Image:
    """Draw one bar divided into shares that sum to 1, with its axis and a legend below.

    scale_title: meaning of the shares.
    """
    entries = [f"{name}: {percent(share)}" for name, share in shares.items()]
    positions, lines = _wrap_legend(entries, width - 2 * MARGIN)
    top = MARGIN + LINE + MARGIN
    legend = top + THICKNESS + AXIS_HEIGHT + MARGIN
    sheet, draw = _blank_chart(width, legend + lines * LINE, title)
    inset = 3 * MARGIN  # room for the labels at the ends of the axis
    length = width - 2 * inset
    left = float(inset)
    colours = series_colors(len(shares))
    for colour, share, entry, (x, line) in zip(colours, shares.values(), entries, positions, strict=True):
        right = left + share * length
        draw.rectangle((left, top, max(left, right - 1), top + THICKNESS), colour)
        y = legend + line * LINE
        draw.rectangle((MARGIN + x, y + 3, MARGIN + x + 16, y + 19), colour)
        draw.text((MARGIN + x + 22, y + 11), entry, INK, font(TEXT), anchor="lm")
        left = right
    draw_axis(sheet, Scale(scale_title, 0.0, 1.0, as_percent=True), inset, top + THICKNESS + 2, length)
    return sheet


def matrix_chart(
    title: str,
    values: np.ndarray,
    rows: Labels,
    columns: Labels,
    *,
    scale: Scale,
    images: Sequence[Image.Image] | None = None,
    highlight: int = -1,
) -> Image.Image:
    """Draw values (rows, columns) as a heat map with labels and its scale; NaN is grey.

    images: one above each column. highlight: index of the row and column with red labels and frames.
    """
    cell = int(np.clip(576 / len(columns.names), 18, 64))
    left = 2 * MARGIN + LINE + rows.width + MARGIN
    top = 2 * MARGIN + 3 * LINE + (cell if images else 0)
    size = len(columns.names) * cell, len(rows.names) * cell
    widths = [left + size[0], font(TITLE).getlength(title) + MARGIN]
    widths.append(font(TEXT).getlength(scale.title) + MARGIN)
    width = max(*(int(content) + MARGIN for content in widths), 420)
    sheet, draw = _blank_chart(width, top + size[1], title)

    draw.text((left + size[0] / 2, MARGIN + LINE + 6), columns.title, GREY, font(TEXT), anchor="mt")
    draw_upward(sheet, (MARGIN + LINE - 8, top + size[1] // 2), rows.title, TEXT, GREY)
    label_every = max(1, -(-(columns.width + 6) // cell))
    for i, name in enumerate(columns.names):
        x, ink = left + i * cell, RED if i == highlight else INK
        if images:
            corner = x + 2, top - LINE - cell, cell - 4
            _paste_icon(sheet, images[i], corner, RED if i == highlight else None)
        if i % label_every == 0:
            draw.text((x + cell / 2, top - LINE / 2), name, ink, font(TEXT), anchor="mm")
    for i, name in enumerate(rows.names):
        ink = RED if i == highlight else INK
        draw.text((left - MARGIN, top + (i + 0.5) * cell), name, ink, font(TEXT), anchor="rm")
    _draw_cells(draw, values, scale, (left, top), cell)
    if highlight >= 0:
        x, y = left + highlight * cell, top + highlight * cell
        draw.rectangle((left - 2, y - 2, left + size[0], y + cell), outline=RED, width=FRAME)
        draw.rectangle((x - 2, top - 2, x + cell, top + size[1]), outline=RED, width=FRAME)
    return vstack([sheet, color_bar(scale, width)])


def percent(share: float) -> str:
    """Return a share in 0..1 as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def _draw_cells(
    draw: ImageDraw.ImageDraw, values: np.ndarray, scale: Scale, corner: tuple[int, int], cell: int
) -> None:
    left, top = corner
    for (row, column), value in np.ndenumerate(values):
        x, y = left + column * cell, top + row * cell
        box = (x, y, x + cell - 2, y + cell - 2)
        if np.isnan(value):
            draw.rectangle(box, FAINT)
            continue
        colour = tuple(apply_colormap(np.asarray(scale.position(value))).tolist())
        draw.rectangle(box, colour)
        if cell >= 44:
            ink = max(INK, PAPER, key=lambda ink: contrast(ink, colour))
            place = x + cell / 2 - 1, y + cell / 2 - 1
            draw.text(place, f"{value:.2f}", ink, font(TEXT), anchor="mm")


def _paste_icon(
    sheet: Image.Image, image: Image.Image, place: tuple[int, int, int], frame: str | None
) -> None:
    """Paste an image into a square (left, top, side), with a frame of a colour around it, or None."""
    left, top, side = place
    if frame:
        ImageDraw.Draw(sheet).rectangle((left, top, left + side - 1, top + side - 1), frame)
    icon = fit_square(image, side - (2 * FRAME if frame else 0))
    sheet.paste(icon, (left + (side - icon.width) // 2, top + (side - icon.height) // 2))


def _wrap_legend(entries: Sequence[str], width: float) -> tuple[list[tuple[float, int]], int]:
    """Return the position of each legend entry, (pixels from the left, line), and the number of lines."""
    positions, left, line = [], 0.0, 0
    for entry in entries:
        length = font(TEXT).getlength(entry) + 46
        if left and left + length > width:
            left, line = 0.0, line + 1
        positions.append((left, line))
        left += length
    return positions, line + 1


def _blank_chart(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return paper with a title, MARGIN pixels higher than `height`, and its drawing context."""
    sheet = Image.new("RGB", (int(width), int(height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), shorten_line(title, width - 2 * MARGIN, TITLE), INK, font(TITLE))
    return sheet, draw
