"""CLIP preprocessing: resize the short side, crop the centre, normalise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...mllm.preprocess import CLIP_MEAN, CLIP_STD


def clip_pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """RGB images -> (N, 3, side, side), as by CLIPImageProcessor, but without torchvision."""
    return normalize(torch.from_numpy(square_pixels(images, side)).float() / 255)


def clip_pixels_of(pixels: Tensor, side: int) -> Tensor:
    """The same for tensors (B, 3, H, W) in -1..1, without PIL; the resize differs by rounding."""
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        size = max(side, round(height * scale)), max(side, round(width * scale))
        pixels = torch.nn.functional.interpolate(
            pixels, size, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[..., top : top + side, left : left + side]
    return normalize((pixels.clamp(-1, 1) + 1) / 2)


def normalize(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 -> CLIP's mean and deviation."""
    mean, std = (torch.from_numpy(t).to(pixels).view(3, 1, 1) for t in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def square_pixels(images: Sequence[Image.Image], side: int) -> np.ndarray:
    """RGB images -> bytes (N, 3, side, side): the largest centred square of each, resized."""
    return np.stack([np.asarray(_centre_square(image, side)).transpose(2, 0, 1) for image in images])


def _centre_square(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    size = max(side, round(image.width * scale)), max(side, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
