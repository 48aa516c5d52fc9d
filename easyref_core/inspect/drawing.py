"""Images for people, drawn with PIL: contact sheets, captions, and heat maps over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .colors import INK, PAPER, apply_colormap

MARGIN, LABEL_HEIGHT = 12, 26  # pixels
GRID_TEXT, MIN_TEXT = 20, 9  # font sizes of a grid's labels
OPACITY = 0.5  # of a heat map; more would hide the image under it


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


def label_grid(
    rows: Mapping[str, Sequence[Image.Image | None]], columns: Sequence[str], cell: int = 256
) -> Image.Image:
    """Draw a grid of images in squares of `cell` pixels: a label above each column, one left of each row.

    The rows' labels are turned by 90 degrees, so that each belongs to one row alone.
    """
    step, labels = cell + MARGIN, [*columns, *rows]
    sizes = range(GRID_TEXT, MIN_TEXT, -1)
    size = next((s for s in sizes if all(font(s).getlength(text) <= cell for text in labels)), MIN_TEXT)
    corner = MARGIN + LABEL_HEIGHT + 4
    sheet = Image.new("RGB", (corner + len(columns) * step, corner + len(rows) * step), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        middle = corner + column * step + cell / 2
        draw.text((middle, corner - 8), shorten_line(label, cell, size), INK, font(size), anchor="ms")
    for row, (label, images) in enumerate(rows.items()):
        top = corner + row * step
        draw_upward(sheet, (corner - 8, top + cell // 2), shorten_line(label, cell, size), size)
        for column, image in enumerate(images):
            if image is not None:
                resized = fit_square(image, cell)
                left = corner + column * step + (cell - resized.width) // 2
                sheet.paste(resized, (left, top + (cell - resized.height) // 2))
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


def overlay_heatmap(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Blend a heat map (rows, columns) in 0..1 over the image in grey, which stays visible everywhere."""
    grey = ImageOps.grayscale(image).convert("RGB")
    resized = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(apply_colormap(np.asarray(resized).clip(0, 1)))
    return Image.blend(grey, colours, OPACITY)


def draw_upward(sheet: Image.Image, place: tuple[int, int], text: str, size: int, ink: str = INK) -> None:
    """Draw a line of text that runs upward; its baseline ends at x, its middle is at y."""
    left, top, right, bottom = font(size).getbbox(text, anchor="ls")
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, 255, font(size), anchor="ls")
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    x, y = place[0] - mask.width + int(bottom), place[1] - mask.height // 2
    sheet.paste(ink, (x, y, x + mask.width, y + mask.height), mask)


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
