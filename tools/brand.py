"""Renew docs/icon.png and docs/banner.png: references whose ribbons run together into one image.

python tools/brand.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageChops, ImageDraw, ImageFont

from devkit.hosts import ROOT

DOCS = ROOT / "docs"
ICON_SIZE, BANNER_SIZE = (400, 400), (1680, 720)  # pixels; the registry asks for at most 400, and for 21:9
SAMPLES = 4  # along a side of a pixel

Point = tuple[float, float]
Colour = tuple[int, int, int]

TOP, BOTTOM, RESULT = (38, 43, 66), (14, 15, 24), (23, 27, 45)  # of the background; of the generated image
WHITE, SOFT = (246, 247, 252), (176, 186, 212)
CORNER = 0.16  # radius of a tile's corners, in sides of the tile
RIBBON, BAND = 0.2, 0.6  # width of a ribbon: in sides of its reference, and in heights of its band
OPACITY = 170  # of a ribbon, of 255


class Reference(NamedTuple):
    """Look of one reference: colours of its star and ground, offset of the star in sides, and its turn."""

    star: Colour
    ground: Colour
    offset: Point
    turn: float


REFERENCES = (
    Reference((255, 206, 84), (29, 96, 104), (-0.05, 0.03), -0.2),
    Reference((255, 116, 104), (92, 34, 66), (0.05, -0.03), 0.25),
    Reference((178, 126, 255), (66, 62, 112), (-0.04, -0.03), 0.1),
    Reference((72, 184, 255), (32, 84, 58), (0.05, 0.04), -0.3),
)


class Square(NamedTuple):
    """A square of `side` pixels with its corner at (left, top)."""

    left: float
    top: float
    side: float

    @property
    def centre(self) -> Point:
        return self.left + self.side / 2, self.top + self.side / 2


def main() -> None:
    for name, image in (("icon.png", icon()), ("banner.png", banner())):
        image.save(DOCS / name, optimize=True)
        print(f"brand: wrote docs/{name}, {image.width} x {image.height} pixels")


def icon() -> Image.Image:
    """Three references and their image, with rounded corners."""
    canvas = _background(ICON_SIZE)
    _scene(canvas, [Square(30, 30 + 118 * i, 104) for i in range(3)], Square(186, 107, 186))
    whole = _mask(canvas)
    ImageDraw.Draw(whole).rounded_rectangle((0, 0, canvas.width - 1, canvas.height - 1), 76 * SAMPLES, 255)
    canvas.putalpha(whole)
    return canvas.resize(ICON_SIZE, Image.Resampling.BOX)


def banner() -> Image.Image:
    """The name, four references and their image."""
    canvas = _background(BANNER_SIZE)
    _scene(canvas, [Square(770, 53 + 158 * i, 140) for i in range(4)], Square(1170, 155, 410))
    draw = ImageDraw.Draw(canvas)
    for text, left, top, size, colour in (
        ("EasyRef", 90, 222, 150, WHITE),
        ("One image from what your", 100, 412, 42, SOFT),
        ("references have in common", 100, 466, 42, SOFT),
    ):
        draw.text((left * SAMPLES, top * SAMPLES), text, colour, ImageFont.load_default(size * SAMPLES))
    return canvas.resize(BANNER_SIZE, Image.Resampling.BOX)


def _scene(canvas: Image.Image, references: Sequence[Square], result: Square) -> None:
    """Draw references, and one ribbon from each to its band of the star in the result."""
    _tile(canvas, result, RESULT)
    right, centre = result.left + result.side, (result.centre[0], result.centre[1] + 0.03 * result.side)
    star = _star(centre, 0.43 * result.side, 0.0)
    top, bottom = (pick(y for _, y in star) for pick in (min, max))
    height = (bottom - top) / len(references)
    inside, before = _mask(canvas), _mask(canvas, 255)
    ImageDraw.Draw(inside).polygon(_scaled(star), 255)
    # Ribbons end at the star's left side: they would show again between its lower points.
    ImageDraw.Draw(before).polygon(_scaled([star[0], *star[:5:-1], (right, bottom), (right, top)]), 0)

    for i, (square, look) in enumerate(zip(references, REFERENCES, strict=False)):
        middle = top + height * (i + 0.5)
        ends = (square.centre, (result.left, middle))
        ribbon = _ribbon(*ends, centre[0], (RIBBON * square.side, BAND * height))
        line, band = _mask(canvas), _mask(canvas)
        ImageDraw.Draw(line).polygon(_scaled(ribbon), OPACITY)
        canvas.paste(look.star, mask=ImageChops.multiply(line, before))
        corners = (result.left, middle - height / 2), (right, middle + height / 2)
        ImageDraw.Draw(band).rectangle(_scaled(corners), 255)
        canvas.paste(look.star, mask=ImageChops.multiply(band, inside))

    for square, look in zip(references, REFERENCES, strict=False):
        _tile(canvas, square, look.ground)
        centre = tuple(c + o * square.side for c, o in zip(square.centre, look.offset, strict=True))
        ImageDraw.Draw(canvas).polygon(_scaled(_star(centre, 0.38 * square.side, look.turn)), look.star)


def _background(size: tuple[int, int]) -> Image.Image:
    """A vertical gradient, SAMPLES times as large as `size`."""
    large = tuple(SAMPLES * side for side in size)
    ramp = Image.linear_gradient("L").resize(large)
    return Image.composite(Image.new("RGB", large, BOTTOM), Image.new("RGB", large, TOP), ramp)


def _mask(canvas: Image.Image, value: int = 0) -> Image.Image:
    return Image.new("L", canvas.size, value)


def _tile(canvas: Image.Image, square: Square, colour: Colour) -> None:
    """Draw a square with round corners and a light rim."""
    left, top, side = (SAMPLES * value for value in square)
    box, rim = (left, top, left + side, top + side), tuple((value + 255) // 2 for value in colour)
    ImageDraw.Draw(canvas).rounded_rectangle(box, CORNER * side, colour, rim, SAMPLES * 2)


def _star(centre: Point, radius: float, turn: float) -> list[Point]:
    """Return the corners of a star with five points."""
    corners = []
    for i in range(10):
        angle, length = math.pi * i / 5 + turn, radius * (1.0 if i % 2 == 0 else 0.5)
        corners.append((centre[0] + length * math.sin(angle), centre[1] - length * math.cos(angle)))
    return corners


def _ribbon(start: Point, end: Point, until: float, widths: tuple[float, float]) -> list[Point]:
    """Return the outline of a ribbon that swings from start to end and goes on straight until x = `until`.

    widths: at start and from `end` on.
    """
    (x0, y0), (x1, y1), (first, last) = start, end, widths
    upper, lower = [], []
    for i in range(65):
        t = i / 64
        eased = t * t * (3 - 2 * t)
        # Measured along y, a steep part would be thinner than the rest.
        slope = 6 * t * (1 - t) * (y1 - y0) / (x1 - x0)
        half = (first + (last - first) * eased) / 2 * math.hypot(1, slope)
        x, y = x0 + (x1 - x0) * t, y0 + (y1 - y0) * eased
        upper.append((x, y - half))
        lower.append((x, y + half))
    upper.append((until, y1 - last / 2))
    lower.append((until, y1 + last / 2))
    return upper + lower[::-1]


def _scaled(points: Sequence[Point]) -> list[Point]:
    return [(SAMPLES * x, SAMPLES * y) for x, y in points]


if __name__ == "__main__":
    main()
