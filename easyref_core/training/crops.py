"""Framing: which part of a picture is trained on, and at what size. Pure functions of PIL images and boxes.

The geometry is the authors' (finetune_sdxl.py), where it leads out of the picture excepted; such places say so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

    from .batches import Size
    from .rows import Box

STRIDE = 64  # sides of a picture in its native aspect are multiples of it
MOST_EXPANSION = 50  # per cent a side, exclusive


class Framed(NamedTuple):
    """A picture as it is trained on, and what SDXL is told of its making; sizes are height, width."""

    image: Image.Image
    original_size: Size
    crop: Size  # top, left
    target_size: Size


def crop_frame(image: Image.Image, resolution: int) -> Framed:
    """The middle square of the picture, its short side resized to `resolution`.

    The authors' option is called --random_crop, but their crop is always central. The size that SDXL is told is the
    file's own, the crop's corner that in the resized picture.
    """
    resized = short_side(image, resolution)
    left, top = ((side - resolution) // 2 for side in resized.size)
    square = resized.crop((left, top, left + resolution, top + resolution))
    return Framed(square, (image.height, image.width), (top, left), (resolution, resolution))


def short_side(image: Image.Image, resolution: int) -> Image.Image:
    """The picture with its short side resized to `resolution`, bilinear."""
    short = min(image.size)
    width, height = (resolution if side == short else side * resolution // short for side in image.size)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def native_frame(image: Image.Image, resolution: int) -> Framed:
    """The whole picture at about resolution x resolution pixels.

    SDXL is told the size after this resize, as if the file had it, and no crop.
    """
    width, height = native_size(image.width, image.height, resolution)
    size = (height, width)
    return Framed(image.resize((width, height), Image.Resampling.BICUBIC), size, (0, 0), size)


def native_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) in multiples of 64, rounded up, so the aspect changes a little.

    A square becomes resolution x resolution. Others are scaled to its area only where they are 1.1 times larger or 0.8
    times smaller along a side; what lies between keeps its size.
    """
    times = math.sqrt(width * height / resolution**2)
    if width == height:
        width = height = resolution
    elif times > 1.1 or times < 0.8:
        width, height = (math.ceil(side / times) for side in (width, height))
    return tuple(STRIDE * math.ceil(side / STRIDE) for side in (width, height))


def single_reference(image: Image.Image, resolution: int) -> Image.Image:
    """A single reference, cropped as its target is when that is cropped.

    The authors cut it at the target's corner, which leaves the picture where the two differ in aspect (a face crop is
    square, its target seldom): black bars. Each is cropped at its own middle here; where they have one aspect, as when
    the reference is the target, that is the same.
    """
    return crop_frame(image, resolution).image


def face_crop(image: Image.Image, face: Box, rng: np.random.Generator) -> Image.Image:
    """The face in a square that reaches a random 0 to 49 % farther on each side, mirrored every other time."""
    percent = int(rng.integers(MOST_EXPANSION))
    crop = image.crop(expanded(square(face), percent, *image.size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def square(face: Box) -> tuple[int, int, int, int]:
    """The face's box made square around its middle: the longer side, rounded down to an even number."""
    x1, y1, x2, y2 = face
    x, y = int((x1 + x2) / 2), int((y1 + y2) / 2)
    half = max(int(x2 - x1 + 1), int(y2 - y1 + 1)) // 2
    return x - half, y - half, x + half, y + half


def expanded(
    box: tuple[int, int, int, int], percent: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """A square box grown by `percent` of its side on every side, as far as the picture is large, then shifted into it.

    The authors' shift from the right or lower edge goes one pixel too far, and a square larger than the picture stays
    so; both would add black columns.
    """
    left, top, right, _ = box
    side = right - left
    margin = max(0, min(side * percent // 100, (width - side) // 2, (height - side) // 2))
    grown = min(side + 2 * margin, width, height)
    left = min(max(0, left - margin), width - grown)
    top = min(max(0, top - margin), height - grown)
    return left, top, left + grown, top + grown
