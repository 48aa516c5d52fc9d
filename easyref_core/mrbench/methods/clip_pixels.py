"""Pictures as CLIP's image tower reads them: short side resized, centre cropped, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from easyref_core.mllm.preprocess import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from torch import Tensor


def clip_pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """RGB images -> (N, 3, side, side), as CLIPImageProcessor makes them (which needs torchvision in transformers 5)."""
    pixels = np.stack([np.asarray(framed(image, side, side)) for image in images])
    return normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)


def clip_pixels_of(pixels: Tensor, side: int) -> Tensor:
    """The same of targets (B, 3, H, W) in -1..1; tensors are resized without PIL, which differs by rounding."""
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        size = max(side, round(height * scale)), max(side, round(width * scale))
        pixels = torch.nn.functional.interpolate(
            pixels, size, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[..., top : top + side, left : left + side]
    return normalised((pixels.clamp(-1, 1) + 1) / 2)


def normalised(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 -> CLIP's scale."""
    mean, std = (torch.from_numpy(t).to(pixels).view(3, 1, 1) for t in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def framed(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of the wanted aspect, resized to it."""
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
