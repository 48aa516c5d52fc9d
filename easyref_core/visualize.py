"""Pictures for people: labelled contact sheets, and a group with what is to be said of it."""

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


def group_sheet(references: Sequence[Image.Image], notes: Sequence[str] = (), cell: int = 144) -> Image.Image:
    """The references in order, each with its number and size in pixels below it; notes stand below all."""
    columns = min(len(references), 6)
    step, rows = cell + MARGIN, -(-len(references) // columns)
    width = max(MARGIN + columns * step, 2 * step + MARGIN)
    bottom = MARGIN + rows * (step + LABEL_HEIGHT)
    font = ImageFont.load_default(size=15)
    lines = [line for note in notes for line in wrapped(note, width - 2 * MARGIN, font)]
    sheet = Image.new("RGB", (width, bottom + len(lines) * LABEL_HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, reference in enumerate(references):
        left, top = MARGIN + i % columns * step, MARGIN + i // columns * (step + LABEL_HEIGHT)
        sheet.paste(ImageOps.contain(reference, (cell, cell)), (left, top))
        draw.text((left, top + cell), f"{i + 1}: {reference.width} x {reference.height}", INK, font)
    for i, line in enumerate(lines):
        draw.text((MARGIN, bottom + i * LABEL_HEIGHT), line, INK, font)
    return sheet


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text as lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
