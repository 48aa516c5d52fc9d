"""How close pictures are to a group: cosines of image embeddings, whatever made those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import normalize

if TYPE_CHECKING:
    from torch import Tensor


def similarity(pictures: Tensor, references: Tensor) -> Tensor:
    """Embeddings (N, D) and (K, D) -> cosine of each picture to each reference (N, K), float32."""
    return normalize(pictures.float(), dim=-1) @ normalize(references.float(), dim=-1).T


def cropped_share(height: int, width: int) -> float:
    """The part of a picture's longer side that its centred square leaves out."""
    return 1 - min(height, width) / max(height, width)
