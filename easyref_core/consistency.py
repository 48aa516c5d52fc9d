"""How near pictures are to a group: cosines of image features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize

from .visualize import INK, MARGIN, PAPER

if TYPE_CHECKING:
    from torch import Tensor

BAR, ROW, LABEL = 420, 24, 110  # pixels: the longest bar, a bar's row, room for its label
FILL, BEST = "#7a9cc6", "#2f7d4f"


def cosines(pictures: Tensor, references: Tensor) -> Tensor:
    """Features (N, F) and (K, F) -> cosine of each picture to each reference (N, K), float32."""
    return normalize(pictures.float(), dim=-1) @ normalize(references.float(), dim=-1).T


def bars(values: Sequence[float], labels: Sequence[str], title: str) -> Image.Image:
    """One horizontal bar from 0 to 1 for each value, with its label and number; the largest is marked."""
    font = ImageFont.load_default(size=15)
    size = LABEL + BAR + 70 + 2 * MARGIN, 2 * MARGIN + ROW * (len(values) + 1)
    plot = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(plot)
    draw.text((MARGIN, MARGIN), title, INK, font)
    best = max(range(len(values)), key=values.__getitem__)
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        top = MARGIN + ROW * (i + 1)
        length = round(BAR * min(max(value, 0.0), 1.0))
        draw.text((MARGIN, top), label, INK, font)
        left = MARGIN + LABEL
        draw.rectangle((left, top + 3, left + length, top + ROW - 6), BEST if i == best else FILL)
        draw.text((left + length + 6, top), f"{value:.3f}", INK, font)
    return plot
