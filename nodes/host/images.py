"""Conversions between the host's IMAGE tensors, single references and PIL images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def split(batch: Tensor) -> list[Tensor]:
    """(batch, height, width, channels) -> single images, each (1, height, width, channels)."""
    return [batch[i : i + 1] for i in range(len(batch))]


def split_group(group: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The references of an EASYREF_GROUP or an IMAGE batch, each (1, height, width, channels)."""
    return list(group) if isinstance(group, tuple) else split(group)


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image -> IMAGE (1, height, width, 3) in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255)[None]
