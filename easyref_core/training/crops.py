"""Crops, resizes and face boxes of training images: pure functions of PIL images and boxes.

The geometry is the authors' (finetune_sdxl.py), except where theirs leaves the image; those places say so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

    from .batches import Size
    from .rows import Box

STRIDE = 64  # pixels: sides of an image in native aspect are multiples of it
MAX_EXPANSION = 50  # per cent per side, exclusive


class Crop(NamedTuple):
    """A cropped or resized image and SDXL's size conditioning for it; sizes are height, width."""

    image: Image.Image
    original_size: Size
    corner: Size  # top, left
    target_size: Size


def center_crop(image: Image.Image, resolution: int) -> Crop:
    """Resize the short side to `resolution` and crop the central square.

    The authors' option is called --random_crop, but their crop is always central. original_size is the file's
    own size, the corner is in pixels of the resized image.
    """
    resized = resize_short_side(image, resolution)
    left, top = ((side - resolution) // 2 for side in resized.size)
    square = resized.crop((left, top, left + resolution, top + resolution))
    return Crop(square, (image.height, image.width), (top, left), (resolution, resolution))


def resize_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Resize the short side to `resolution`, bilinear."""
    short = min(image.size)
    width, height = (resolution if side == short else side * resolution // short for side in image.size)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def native_resize(image: Image.Image, resolution: int) -> Crop:
    """Resize the uncropped image to about resolution x resolution pixels.

    As in the authors' code, original_size is the size after this resize.
    """
    width, height = native_size(image.width, image.height, resolution)
    size = (height, width)
    return Crop(image.resize((width, height), Image.Resampling.BICUBIC), size, (0, 0), size)


def native_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) rounded up to multiples of 64, which changes the aspect a little.

    A square becomes resolution x resolution. Other images are scaled to its area only if they are more than
    1.1 times larger or less than 0.8 times as large along a side.
    """
    scale = math.sqrt(width * height / resolution**2)
    if width == height:
        width = height = resolution
    elif scale > 1.1 or scale < 0.8:
        width, height = (math.ceil(side / scale) for side in (width, height))
    return tuple(STRIDE * math.ceil(side / STRIDE) for side in (width, height))


def crop_to(image: Image.Image, size: Size) -> Crop:
    """Resize the image until it covers `size` and crop its center, for a batch of about the same aspect."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    # rounding must not leave a side short
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = ((have - want) // 2 for have, want in zip(resized, (width, height), strict=True))
    cropped = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return Crop(cropped, resized[::-1], (top, left), size)


def face_crop(image: Image.Image, face: Box, rng: np.random.Generator) -> Image.Image:
    """Square crop of a face, expanded by a random 0 to 49 % per side and mirrored with probability 0.5."""
    percent = int(rng.integers(MAX_EXPANSION))
    crop = image.crop(expand_box(square_box(face), percent, *image.size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def square_box(face: Box) -> tuple[int, int, int, int]:
    """Square around the center of a face box; its side is the longer one, rounded down to an even number."""
    x1, y1, x2, y2 = face
    x, y = int((x1 + x2) / 2), int((y1 + y2) / 2)
    half = max(int(x2 - x1 + 1), int(y2 - y1 + 1)) // 2
    return x - half, y - half, x + half, y + half


def expand_box(
    box: tuple[int, int, int, int], percent: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """Expand a square box by `percent` of its side per side, at most to the image, and shift it inside.

    The authors' shift from the right or lower edge goes one pixel too far, and their square may exceed the
    image; both would add black columns.
    """
    left, top, right, _ = box
    side = right - left
    margin = max(0, min(side * percent // 100, (width - side) // 2, (height - side) // 2))
    size = min(side + 2 * margin, width, height)
    left = min(max(0, left - margin), width - size)
    top = min(max(0, top - margin), height - size)
    return left, top, left + size, top + size
