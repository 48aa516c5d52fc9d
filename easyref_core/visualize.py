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
