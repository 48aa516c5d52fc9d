"""Previews of a node's run, a text or a contact sheet, shown on the node and stored in the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comfy_api.latest import ui

from ...easyref_core.inspect.drawing import contact_sheet, vstack
from ...easyref_core.utils.area_mean import grid_means
from ...easyref_core.utils.images import thumbnail, to_rgb
from .images import to_tensor

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

COLUMNS, CELL = 6, 128  # of a contact sheet; pixels
UNMARKED = 0.2  # brightness outside a mask


def text(content: str) -> dict[str, Any]:
    """The ui part of a node's output with a text, which web/notes.js shows on the node."""
    return ui.PreviewText(content).as_dict()


def images(references: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> dict[str, Any]:
    """The ui part with references, each (1, height, width, C), in rows of six, with numbers and sizes.

    masks: one for each, (height, width), outside of which a reference is drawn dark.
    """
    captions = [f"{i + 1}: {image.shape[2]}x{image.shape[1]}" for i, image in enumerate(references)]
    masks = masks or [None] * len(references)
    cells = [cell(reference, mask) for reference, mask in zip(references, masks, strict=True)]
    rows = []
    for start in range(0, len(cells), COLUMNS):
        row = cells[start : start + COLUMNS]
        row += [None] * (min(COLUMNS, len(cells)) - len(row))
        headings = dict(enumerate(captions[start : start + COLUMNS]))
        rows.append(contact_sheet({"": row}, CELL, headings))
    return ui.PreviewImage(to_tensor(vstack(rows))).as_dict()


def cell(reference: Tensor, mask: Tensor | None) -> Image.Image | None:
    """A thumbnail of a reference, dark outside its mask; None if one of them is not valid."""
    try:
        cell = thumbnail(reference[0], CELL)
        if mask is None:
            return cell
        marked = grid_means(mask[None].cpu().clamp(0, 1), (cell.height, cell.width))[0]
        shade = UNMARKED + (1 - UNMARKED) * marked
        return to_rgb(to_tensor(cell)[0] * shade[..., None])
    except ValueError:  # the encoder raises an error that explains it
        return None
