"""Pictures for people: labelled contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LABEL_HEIGHT = 12, 26  # pixels
PAPER, INK = "white", "black"


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]], cell: int = 256) -> Image.Image:
    """One row of pictures under each label, every picture fitted into a square of `cell` pixels."""
    columns = max(len(pictures) for pictures in rows.values())
    row_height = LABEL_HEIGHT + cell + MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * (cell + MARGIN), MARGIN + len(rows) * row_height), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for row, (label, pictures) in enumerate(rows.items()):
        top = MARGIN + row * row_height
        draw.text((MARGIN, top), label, INK, font)
        for column, picture in enumerate(pictures):
            fitted = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.NEAREST)
            sheet.paste(fitted, (MARGIN + column * (cell + MARGIN), top + LABEL_HEIGHT))
    return sheet
