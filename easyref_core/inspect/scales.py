"""Scales of the charts' values: round ticks, an axis below a chart, and the colour bar of a heat map."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .colors import GREY, INK, PAPER, apply_colormap
from .drawing import MARGIN, font

TEXT, LINE = 20, 30  # font size; pixels of one line of text
TICK = 6  # pixels, length of a tick
BAR = 18  # pixels, height of a colour bar
MAX_BAR = 480  # pixels, width of a colour bar
AXIS_HEIGHT = TICK + 2 * LINE
MAX_TICKS = 6


class Scale(NamedTuple):
    """Values from low to high, with a title that names their unit. as_percent: values in 0..1 as percent."""

    title: str
    low: float
    high: float
    as_percent: bool = False

    def position(self, value: float) -> float:
        """Return the position of a value between low and high, in 0..1."""
        span = self.high - self.low
        return min(max((value - self.low) / span, 0.0), 1.0) if span > 0 else 0.0

    def ticks(self, count: int = MAX_TICKS) -> list[float]:
        """Return at most `count` round values from low to high, at least 2; only low if both are equal."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(span))
        for step in (factor * power for factor in (0.1, 0.2, 0.25, 0.5, 1, 2, 5)):
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first < count:
                return [i * step for i in range(first, last + 1)]
        return [self.low, self.high]

    def label(self, value: float) -> str:
        """Return a tick's label."""
        return f"{100 * value:.4g} %" if self.as_percent else f"{value:.4g}"


def draw_axis(sheet: Image.Image, scale: Scale, left: float, top: float, width: float) -> None:
    """Draw ticks, their labels and the title below a chart, in AXIS_HEIGHT pixels."""
    draw = ImageDraw.Draw(sheet)
    draw.line((left, top, left + width, top), GREY)
    free = 0.0  # first pixel that no label covers
    for value in scale.ticks(max(2, int(width // 80))):
        x, label = left + width * scale.position(value), scale.label(value)
        draw.line((x, top, x, top + TICK), GREY)
        half = font(TEXT).getlength(label) / 2
        if x - half >= free:
            draw.text((x, top + TICK + 2), label, INK, font(TEXT), anchor="mt")
            free = x + half + 8
    half = font(TEXT).getlength(scale.title) / 2 + MARGIN
    middle = max(half, min(left + width / 2, sheet.width - half))
    draw.text((middle, top + TICK + LINE), scale.title, GREY, font(TEXT), anchor="mt")


def color_bar(scale: Scale, width: int) -> Image.Image:
    """Draw the colours of a heat map with their scale."""
    sheet = Image.new("RGB", (width, MARGIN + BAR + AXIS_HEIGHT), PAPER)
    length = min(MAX_BAR, width - 6 * MARGIN)
    left = (width - length) // 2
    band = apply_colormap(np.linspace(0, 1, length))[None].repeat(BAR, axis=0)
    sheet.paste(Image.fromarray(band), (left, MARGIN))
    draw_axis(sheet, scale, left, MARGIN + BAR, length)
    return sheet
