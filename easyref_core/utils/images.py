"""One reference image: checks, conversion to RGB, thumbnails, square crops, black and noise images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive

MIN_SIDE = 14  # pixels, one patch of the vision tower
MAX_ASPECT_RATIO = 200  # qwen_vl_utils refuses more
BLOCK_PIXELS = 2**15  # converted at a time, so that the intermediate values stay in the processor's cache
UNCONDITIONAL_SIDE = 512  # pixels of the black image in the authors' inference.py


def check_image(image: Image.Image | Tensor, name: str = "reference") -> tuple[int, int]:
    """Return width and height of a PIL image or a (H, W, C) float tensor, without looking at its values.

    Raises ValueError or TypeError for anything that cannot be a reference.
    """
    if isinstance(image, Image.Image):
        check_sides(*image.size, name)
        return image.size
    if not isinstance(image, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(image).__name__}; wanted a PIL image or a (height, width, 3) float tensor."
        )
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}; wanted (height, width, channels) with 1, 3 or 4 "
            "channels. Pass the images of a batch one by one."
        )
    if image.is_meta or image.layout is not torch.strided:
        raise ValueError(
            f"{name} is a {image.layout} tensor on {image.device}; wanted one that holds its values."
        )
    if not image.is_floating_point():
        raise ValueError(f"{name} holds {image.dtype} values; wanted floats in 0..1. Divide 0..255 by 255.")
    height, width, _ = image.shape
    check_sides(width, height, name)
    return width, height


def check_sides(width: int, height: int, name: str) -> None:
    """Raise ValueError for an image that is too small or too thin."""
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{name} is {width}x{height} pixels, smaller than one patch of the vision tower (14x14). "
            "Use a larger image."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{name} is {width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other. "
            "Crop it."
        )


def to_rgb(image: Image.Image | Tensor, name: str = "reference") -> Image.Image:
    """Convert a PIL image of any mode, or a (H, W, C) float tensor in 0..1, to an RGB image.

    Alpha is dropped, not composited, as PIL's convert does in the authors' code.
    Raises ValueError or TypeError as check_image does, and for values that are not finite.
    """
    check_image(image, name)
    if isinstance(image, Image.Image):
        if image.mode.startswith("I"):  # 16 bits: PIL's convert would clip at 255, which leaves white
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        try:
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{name}, of PIL's mode {image.mode}, cannot be read as RGB ({error}). Its file is "
                "damaged, or convert it first: wanted any mode that PIL converts to RGB."
            ) from error
    return Image.fromarray(_to_bytes(image.detach().to("cpu", torch.float32).numpy(), name))


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W, C) float32 in 0..1 -> (H, W, 3) bytes; errors as for to_rgb.

    numpy, because it starts no threads of its own in those that prepare a group.
    """
    pixels = np.empty((*values.shape[:2], 3), np.uint8)
    rows = max(1, BLOCK_PIXELS // values.shape[1])
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        if not np.isfinite(block).all():
            broken = int((~np.isfinite(values)).sum())
            raise ValueError(
                f"{name} holds {broken} values that are NaN or infinite. Check the node that made it."
            )
        block = block[..., :3].clip(0, 1)
        np.multiply(block, 255, out=block)
        # Rounding, not truncating, restores the exact bytes of an image that was divided by 255.
        pixels[start : start + rows] = np.rint(block, out=block)
    return pixels


def thumbnail(image: Image.Image | Tensor, side: int) -> Image.Image:
    """The image as RGB at its own aspect, with no side longer than `side` pixels. Raises as to_rgb does."""
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        # Large tensors are subsampled first, because converting all of their values takes most of the time.
        step = max(1, max(image.shape[:2]) // (4 * side))
        image = image[::step, ::step] if min(image.shape[:2]) // step >= MIN_SIDE else image
    rgb = to_rgb(image)
    rgb.thumbnail((side, side), Image.Resampling.BOX)
    return rgb


def middle_square(height: int, width: int) -> Box:
    """The largest square in the middle of an image."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def square_around(mask: Tensor, height: int, width: int, padding: float, name: str = "The mask") -> Box:
    """The square around the marked part (above 0.5) of a mask (h, w), in an image of height x width pixels.

    The mask may have another size than the image. The side of the square is `padding` times the longer side
    of the marked part's bounding box, at most the image's shorter side; it is moved inside the image.
    Raises ValueError for a mask that marks nothing; the error calls it `name`.
    """
    marked = mask > 0.5
    rows, columns = (marked.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise ValueError(
            f"{name} marks nothing (no value above 0.5), so there is nothing to crop around. Paint it in the "
            "mask editor, or choose another crop."
        )
    down, across = height / mask.shape[0], width / mask.shape[1]
    top, bottom = int(rows[0]) * down, (int(rows[-1]) + 1) * down
    left, right = int(columns[0]) * across, (int(columns[-1]) + 1) * across
    side = max(round(min(padding * max(bottom - top, right - left), height, width)), 1)
    x, y = (
        min(max(round((start + end - side) / 2), 0), length - side)
        for start, end, length in ((left, right, width), (top, bottom, height))
    )
    return x, y, x + side, y + side


def black_image() -> Image.Image:
    """The authors' unconditional reference (inference.py)."""
    return Image.new("RGB", (UNCONDITIONAL_SIDE, UNCONDITIONAL_SIDE))


def noise_image(seed: int, strength: float) -> Image.Image:
    """Uniform noise from 0 to strength * 255 in every channel, of the black image's size.

    seed: 0 to 2**64 - 1, for the same image on every machine. Raises ValueError unless strength is 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"The strength of the noise is {strength:g}; wanted 0 (black) to 1.")
    shape = UNCONDITIONAL_SIDE, UNCONDITIONAL_SIDE, 3
    # The raw bits, because numpy guarantees them across versions, unlike the distributions built on them.
    noise = np.random.PCG64(seed).random_raw(UNCONDITIONAL_SIDE**2 * 3 // 8).astype("<u8").view(np.uint8)
    return Image.fromarray((noise.reshape(shape) * strength).round().astype(np.uint8))
