"""Images for people, drawn with PIL: contact sheets, captions, and heat maps over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LABEL_HEIGHT = 12, 26  # pixels
PAPER, INK = "white", "black"
# Anchors of the colour map from 0 to 1. Its brightness rises steadily, so it can be read without colour too.
INFERNO = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]],
    cell: int = 256,
    headings: Mapping[int, str] | None = None,
) -> Image.Image:
    """Draw one row of images under each label, each fitted into a square of `cell` pixels; None leaves a gap.

    headings: {column: text above it}.
    """
    columns = max(len(images) for images in rows.values())
    row_height, top = LABEL_HEIGHT + cell + MARGIN, MARGIN + (LABEL_HEIGHT if headings else 0)
    sheet = Image.new("RGB", (MARGIN + columns * (cell + MARGIN), top + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in (headings or {}).items():
        left = MARGIN + column * (cell + MARGIN)
        draw.text((left, MARGIN), shorten_line(heading, cell, 16), INK, font(16))
    for label, images in rows.items():
        draw.text((MARGIN, top), shorten_line(label, sheet.width - 2 * MARGIN, 16), INK, font(16))
        for column, image in enumerate(images):
            if image is not None:
                left = MARGIN + column * (cell + MARGIN)
                sheet.paste(fit_square(image, cell), (left, top + LABEL_HEIGHT))
        top += row_height
    return sheet


def caption_grid(
    images: Sequence[Image.Image], captions: Sequence[str], cell: int = 256, columns: int = 4
) -> Image.Image:
    """Draw images row by row, each fitted into a square of `cell` pixels with its caption below."""
    columns = min(columns, len(images))
    step, line = cell + MARGIN, LABEL_HEIGHT + 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * step, MARGIN + rows * (step + line)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * step, MARGIN + row * (step + line)
        resized = fit_square(image, cell)
        sheet.paste(resized, (left + (cell - resized.width) // 2, top + cell - resized.height))
        text = shorten_line(caption, cell, 20)
        draw.text((left + cell / 2, top + cell + 4), text, INK, font(20), anchor="ma")
    return sheet


def vstack(images: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically, on paper as wide as the widest."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), PAPER)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def tile(images: Sequence[Image.Image], cell: int) -> Image.Image:
    """Tile images in as many columns as rows, to fit into one square of `cell` pixels."""
    columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    resized = [fit_square(image, cell // columns) for image in images]
    width, height = (max(sides) for sides in zip(*(image.size for image in resized), strict=True))
    sheet = Image.new("RGB", (columns * width, -(-len(resized) // columns) * height), PAPER)
    for i, image in enumerate(resized):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def overlay_heatmap(image: Image.Image, heat: np.ndarray, opacity: float = 0.75) -> Image.Image:
    """Blend a heat map (rows, columns) in 0..1 over the image in grey; hot areas are more opaque."""
    grey = ImageOps.grayscale(image).convert("RGB")
    resized = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    strength = np.asarray(resized).clip(0, 1)
    alpha = Image.fromarray((255 * opacity * (0.4 + 0.6 * strength)).astype(np.uint8))
    return Image.composite(Image.fromarray(apply_colormap(strength)), grey, alpha)


def apply_colormap(values: np.ndarray) -> np.ndarray:
    """Return the INFERNO colours (..., 3) in bytes of values (...) in 0..1."""
    anchors = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(values, anchors, channel) for channel in zip(*INFERNO, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def fit_square(image: Image.Image, cell: int) -> Image.Image:
    """Resize an image to fit into a square of `cell` pixels; upscaling keeps pixels sharp."""
    upscales = max(image.size) <= cell
    resampling = Image.Resampling.NEAREST if upscales else Image.Resampling.LANCZOS
    return ImageOps.contain(image.convert("RGB"), (cell, cell), resampling)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font that PIL includes."""
    return ImageFont.load_default(size=size)


def shorten_line(text: str, width: float, size: int) -> str:
    """Return as much of one line of text as fits into `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
