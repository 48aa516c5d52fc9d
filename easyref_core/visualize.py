"""Pictures for people: labelled contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LABEL_HEIGHT = 12, 26  # pixels
PAPER, INK = "white", "black"


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
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for column, heading in (headings or {}).items():
        draw.text((MARGIN + column * (cell + MARGIN), MARGIN), heading, INK, font)
    for label, pictures in rows.items():
        draw.text((MARGIN, top), label, INK, font)
        for column, picture in enumerate(pictures):
            if picture is not None:
                fitted = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.NEAREST)
                sheet.paste(fitted, (MARGIN + column * (cell + MARGIN), top + LABEL_HEIGHT))
        top += row_height
    return sheet


def labelled_grid(
    pictures: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Pictures, row by row, with a label left of each row and above each column."""
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    font = ImageFont.load_default(size=16)
    left = 2 * MARGIN + round(max(font.getlength(label) for label in rows))
    top = MARGIN + LABEL_HEIGHT
    size = left + len(columns) * (width + MARGIN), top + len(rows) * (height + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        draw.text((left + i * (width + MARGIN), MARGIN), label, INK, font)
    for i, label in enumerate(rows):
        draw.text((MARGIN, top + i * (height + MARGIN) + height // 2 - 8), label, INK, font)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, len(columns))
        sheet.paste(picture, (left + column * (width + MARGIN), top + row * (height + MARGIN)))
    return sheet
