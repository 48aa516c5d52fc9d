"""Pictures for people: contact sheets, captions and heat maps laid over pictures. PIL only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LABEL_HEIGHT = 12, 26  # pixels
PAPER, INK = "white", "black"
# Colours of a heat map from 0 to 1, dark to bright, so that it can be read without colour too.
INFERNO = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]],
    cell: int = 256,
    headings: Mapping[int, str] | None = None,
) -> Image.Image:
    """One row of pictures under each label, every picture fitted into a square of `cell` pixels; None leaves one free.

    headings: what stands above the columns of these numbers.
    """
    columns = max(len(pictures) for pictures in rows.values())
    row_height, top = LABEL_HEIGHT + cell + MARGIN, MARGIN + (LABEL_HEIGHT if headings else 0)
    sheet = Image.new("RGB", (MARGIN + columns * (cell + MARGIN), top + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in (headings or {}).items():
        left = MARGIN + column * (cell + MARGIN)
        draw.text((left, MARGIN), shortened(heading, cell, 16), INK, font(16))
    for label, pictures in rows.items():
        draw.text((MARGIN, top), shortened(label, sheet.width - 2 * MARGIN, 16), INK, font(16))
        for column, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(
                    fit_square(picture, cell), (MARGIN + column * (cell + MARGIN), top + LABEL_HEIGHT)
                )
        top += row_height
    return sheet


def caption_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], cell: int = 256, columns: int = 4
) -> Image.Image:
    """Pictures row by row, each fitted into a square of `cell` pixels with its caption below."""
    columns = min(columns, len(pictures))
    step, line = cell + MARGIN, LABEL_HEIGHT + 6
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * step, MARGIN + rows * (step + line)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * step, MARGIN + row * (step + line)
        shown = fit_square(picture, cell)
        sheet.paste(shown, (left + (cell - shown.width) // 2, top + cell - shown.height))
        draw.text((left + cell / 2, top + cell + 4), shortened(caption, cell, 20), INK, font(20), anchor="ma")
    return sheet


def vstack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, on paper as wide as the widest."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def overlay_heatmap(picture: Image.Image, heat: np.ndarray, opacity: float = 0.75) -> Image.Image:
    """A heat map (rows, columns) in 0..1 over a picture in grey; the more heat, the less of the picture."""
    grey = ImageOps.grayscale(picture).convert("RGB")
    spread = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(spread).clip(0, 1)
    cover = Image.fromarray((255 * opacity * (0.4 + 0.6 * strength)).astype(np.uint8))
    return Image.composite(Image.fromarray(heat_colours(strength)), grey, cover)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Values (...) in 0..1 -> colours (..., 3) in bytes."""
    places = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(values, places, channel) for channel in zip(*INFERNO, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def fit_square(picture: Image.Image, cell: int) -> Image.Image:
    """A picture as large as fits into a square of `cell` pixels; pixels stay sharp where it grows."""
    grows = max(picture.size) <= cell
    how = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    return ImageOps.contain(picture.convert("RGB"), (cell, cell), how)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that PIL brings along."""
    return ImageFont.load_default(size=size)


def shortened(text: str, width: float, size: int) -> str:
    """As much of one line of text as fits into `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
