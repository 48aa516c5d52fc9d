"""Previews of a node's run, a text or a contact sheet, shown on the node and stored in the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comfy_api.feature_flags import supports_feature
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context

from ...easyref_core.inspect.drawing import contact_sheet, vstack
from ...easyref_core.utils.images import thumbnail
from .images import to_tensor

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

OF_THE_FRONTEND = "supports_preview_metadata"  # a feature that every supported frontend announces
COLUMNS, CELL = 6, 128  # of a contact sheet; pixels


def text(content: str) -> dict[str, Any]:
    """The ui part of a node's output with a text.

    The text is also sent as progress, because the frontend shows the ui part on some nodes only. Other
    clients do not get it, because some take every binary message for an image.
    """
    context = get_executing_context()
    if context is not None:  # None outside the host's executor
        from server import PromptServer

        server = PromptServer.instance
        if supports_feature(server.sockets_metadata, server.client_id, OF_THE_FRONTEND):
            server.send_progress_text(content, context.node_id, server.client_id)
    return ui.PreviewText(content).as_dict()


def images(references: Sequence[Tensor]) -> dict[str, Any]:
    """The ui part with references, each (1, height, width, C), in rows of six, with numbers and sizes."""
    captions = [f"{i + 1}: {image.shape[2]}x{image.shape[1]}" for i, image in enumerate(references)]
    cells = [_cell(reference[0]) for reference in references]
    rows = []
    for start in range(0, len(cells), COLUMNS):
        row = cells[start : start + COLUMNS]
        row += [None] * (min(COLUMNS, len(cells)) - len(row))
        headings = dict(enumerate(captions[start : start + COLUMNS]))
        rows.append(contact_sheet({"": row}, CELL, headings))
    return ui.PreviewImage(to_tensor(vstack(rows))).as_dict()


def _cell(image: Tensor) -> Image.Image | None:
    try:
        return thumbnail(image, CELL)
    except ValueError:  # the encoder raises an error that explains it
        return None
