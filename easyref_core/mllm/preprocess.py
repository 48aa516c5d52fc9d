"""Preprocessing: references -> flattened patches and their grid, pixel for pixel as in the authors' code.

The arithmetic runs on the CPU in uint8 and float32, so every machine encodes the same pixels.
Sources: qwen_vl_utils 0.0.8 `fetch_image`, transformers 4.45.2 `Qwen2VLImageProcessor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image

from ..utils.images import check_image, to_rgb

if TYPE_CHECKING:
    from torch import Tensor

    from .config import EasyRefConfig

SIZE = 336  # pixels, the authors' cond_image_size: about (336 / 28)^2 = 144 image tokens a reference
# image tokens along a side; the maximum is Qwen2-VL's
MIN_SIDE_TOKENS, MAX_SIDE_TOKENS = 2, 128
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
# (256, 3), the normalised value of each byte. The authors' processor rescales to 0..1 in float64, too.
NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32)[:, None] - CLIP_MEAN) / CLIP_STD
# (768,), the same, channel after channel
NORMALISED_FLAT = torch.from_numpy(NORMALISED.T.reshape(-1))


def preprocess(
    images: Sequence[Image.Image | Tensor], config: EasyRefConfig, size: int = SIZE
) -> tuple[Tensor, Tensor]:
    """Return the group's patches (sum of patches, 1176), float32, and its grid (K, 3): frames, rows, columns.

    images: PIL images of any mode, or (H, W, C) float tensors in 0..1; sizes may differ, alpha is dropped.
    Raises ValueError or TypeError for an empty group, a size out of bounds and anything but images.
    """
    check_group(images, config, size)
    pixels = [pixels_of(image, f"reference {i + 1}", config, size) for i, image in enumerate(images)]
    return patches_of(pixels, config), grid_of([image.shape[:2] for image in pixels], config)


def check_group(
    images: Sequence[Image.Image | Tensor], config: EasyRefConfig, size: int
) -> list[tuple[int, int]]:
    """Return width and height of each reference; errors as for preprocess, but no values are checked."""
    low, high = (tokens * config.pixels_per_token for tokens in (MIN_SIDE_TOKENS, MAX_SIDE_TOKENS))
    if not low <= size <= high:
        raise ValueError(f"The size is {size} pixels; wanted {low} to {high} (336 as in training).")
    if isinstance(images, Image.Image):
        raise TypeError("images is one image; wanted a list of them, even of one.")
    if not hasattr(images, "__len__") or isinstance(images, (str, bytes, Mapping)):
        raise TypeError(
            f"images is a {type(images).__name__}; wanted a list of PIL images or (height, width, 3) tensors."
        )
    if not len(images):
        raise ValueError(
            "The group holds no reference. Give it at least one image (EasyRef works best with 3 or more)."
        )
    return [check_image(image, f"reference {i + 1}") for i, image in enumerate(images)]


def pixels_of(image: Image.Image | Tensor, name: str, config: EasyRefConfig, size: int) -> np.ndarray:
    """Resize one reference to bytes (H, W, 3), both sides in whole image tokens; errors call it `name`."""
    return np.asarray(resize(to_rgb(image, name), config, size))


def patches_of(pixels: Sequence[np.ndarray], config: EasyRefConfig) -> Tensor:
    """Concatenate the patches of resized images, each (H, W, 3) in bytes -> (sum of patches, 1176)."""
    return torch.cat([patchify(image[None], config) for image in pixels])


def grid_of(sides: Sequence[tuple[int, int]], config: EasyRefConfig) -> Tensor:
    """Grid (K, 3) of frames, rows and columns in patches. sides: height and width of each resized image."""
    return torch.tensor(
        [(1, height // config.patch_size, width // config.patch_size) for height, width in sides]
    )


def resize(image: Image.Image, config: EasyRefConfig, size: int = SIZE) -> Image.Image:
    """Both resizes of the authors' pipeline, to Qwen2-VL's bounds and to those of `size`, each in bytes."""
    for height, width in resized_sides(image.height, image.width, config, size):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image


def resized_sides(height: int, width: int, config: EasyRefConfig, size: int) -> list[tuple[int, int]]:
    """Height and width in pixels after each of the two resizes."""
    unit = config.pixels_per_token
    first = target_size(height, width, unit, 4 * unit**2, MAX_SIDE_TOKENS**2 * unit**2)
    return [first, target_size(*first, unit, *pixel_limits(size, unit))]


def pixel_limits(size: int, unit: int = 28) -> tuple[int, int]:
    """Bounds of a resized reference's area. At 336: 94,864 to 113,680 pixels (121 to 145 image tokens)."""
    return (size // unit - 1) ** 2 * unit**2, ((size // unit) ** 2 + 1) * unit**2


def target_size(height: int, width: int, unit: int, low: int, high: int) -> tuple[int, int]:
    """Height and width in multiples of `unit` with low <= area <= high, at about the same aspect.

    The area may exceed `high` for an image so thin that it would be less than one unit wide.
    """
    h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
    if h * w > high:
        shrink = math.sqrt(height * width / high)
        # Never below one unit: a long thin image would otherwise vanish (the authors' code fails there).
        h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif h * w < low:
        grow = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return h, w


def patchify(images: np.ndarray, config: EasyRefConfig) -> Tensor:
    """Normalise n images of one size (n, H, W, 3) in bytes and flatten them to patches (n * patches, 1176).

    The four patches of an image token are adjacent; the still image is repeated into two frames.
    """
    patches = rearrange(
        images,
        "n (h mh ph) (w mw pw) c -> (n h w mh mw) c (ph pw)",
        mh=config.merge_size,
        mw=config.merge_size,
        ph=config.patch_size,
        pw=config.patch_size,
    )
    # Rearranged as bytes and looked up afterwards, because the floats are four times as large.
    indexes = patches.astype(np.int32) + 256 * np.arange(3, dtype=np.int32)[:, None]
    values = NORMALISED_FLAT.index_select(0, torch.from_numpy(indexes.reshape(-1)))
    frames = config.temporal_patch_size
    return repeat(values.view(patches.shape), "n c values -> n (c frames values)", frames=frames)
