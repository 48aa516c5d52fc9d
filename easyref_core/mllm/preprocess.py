"""References -> flattened patches and their grid, pixel for pixel as the authors' code feeds Qwen2-VL.

The arithmetic runs on the CPU in uint8 and float32 whatever the device, so every machine encodes the same pixels.
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

if TYPE_CHECKING:
    from torch import Tensor

    from .config import EasyRefConfig

SIZE = 336  # pixels, the authors' cond_image_size: about (336 / 28)^2 = 144 image tokens a reference
LARGEST = 128  # image tokens along a side: Qwen2-VL's own limit, 16384 image tokens
MAX_ASPECT_RATIO = 200  # qwen_vl_utils refuses more
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
# What each byte becomes, (256, 3): rescaled to 0..1 in float64, as the authors' processor does, then normalised.
NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32)[:, None] - CLIP_MEAN) / CLIP_STD


def preprocess(
    images: Sequence[Image.Image | Tensor], config: EasyRefConfig, size: int = SIZE
) -> tuple[Tensor, Tensor]:
    """The group's patches (sum of patches, 1176) in float32, and its grid (K, 3): frames, rows, columns in patches.

    Arguments and errors as for read_pixels.
    """
    pixels = read_pixels(images, config, size)
    return patches_of(pixels, config), grid_of([image.shape[:2] for image in pixels], config)


def read_pixels(
    images: Sequence[Image.Image | Tensor], config: EasyRefConfig, size: int = SIZE
) -> list[np.ndarray]:
    """Each reference as the MLLM reads it: bytes (H, W, 3), both sides whole image tokens.

    images: PIL images of any mode, or (H, W, C) float tensors in 0..1; sizes may differ, alpha is dropped.
    Raises ValueError on an empty group and on an image that holds no picture.
    """
    check_group(images, config, size)
    return [pixels_of(image, f"reference {i + 1}", config, size) for i, image in enumerate(images)]


def check_group(
    images: Sequence[Image.Image | Tensor], config: EasyRefConfig, size: int
) -> list[tuple[int, int]]:
    """Width and height of each reference.

    Raises ValueError for a size outside its bounds, for an empty group and for what is no picture by its form.
    """
    unit = config.pixels_per_token
    if not 2 * unit <= size <= LARGEST * unit:
        raise ValueError(
            f"The size is {size} pixels; wanted {2 * unit} to {LARGEST * unit} (336 as in training)."
        )
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
    """One reference as read_pixels gives it; errors call it `name`."""
    return np.asarray(resize(to_rgb(image, name), config, size))


def patches_of(pixels: Sequence[np.ndarray], config: EasyRefConfig) -> Tensor:
    """Bytes of images, each (H, W, 3) -> their patches, one image after the other (sum of patches, 1176)."""
    return torch.cat([patchify(image[None], config) for image in pixels])


def grid_of(sides: Sequence[tuple[int, int]], config: EasyRefConfig) -> Tensor:
    """Frames, rows and columns in patches, (K, 3), of images as read_pixels gives them. sides: height, width of each."""
    return torch.tensor(
        [(1, height // config.patch_size, width // config.patch_size) for height, width in sides]
    )


def black_image() -> Image.Image:
    """The authors' unconditional reference (inference.py: a black 512x512 image)."""
    return Image.new("RGB", (512, 512))


def check_image(image: Image.Image | Tensor, name: str = "reference") -> tuple[int, int]:
    """Width and height of one reference. Raises ValueError or TypeError for what is no picture by its form."""
    if isinstance(image, Image.Image):
        check_sides(*image.size, name)
        return image.size
    if not isinstance(image, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(image).__name__}; wanted a PIL image or a (height, width, 3) float tensor."
        )
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}; wanted (height, width, channels) with 1, 3 or 4 channels. "
            "Pass the images of a batch one by one."
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


def to_rgb(image: Image.Image | Tensor, name: str = "reference") -> Image.Image:
    """One reference as an RGB image. Alpha is dropped, not composited, as PIL's convert does in the authors' code."""
    check_image(image, name)
    if isinstance(image, Image.Image):
        if image.mode.startswith("I"):  # 16 bits: PIL's convert would clip at 255, which leaves white
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        try:
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{name}, of PIL's mode {image.mode}, cannot be read as RGB ({error}). Its file is damaged, or convert it first: "
                "wanted any mode that PIL converts to RGB."
            ) from error
    pixels = image.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        broken = int((~torch.isfinite(pixels)).sum())
        raise ValueError(
            f"{name} holds {broken} values that are NaN or infinite. Check the node that made it."
        )
    # Rounding (not truncating) gives back the exact bytes of a picture that was divided by 255.
    pixels = (pixels[..., :3].clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(-1, -1, 3).numpy())


def resize(image: Image.Image, config: EasyRefConfig, size: int = SIZE) -> Image.Image:
    """Both resizes of the authors' pipeline: to Qwen2-VL's widest bounds, then to `size`'s. Each rounds to bytes."""
    for height, width in resized_sides(image.height, image.width, config, size):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image


def resized_sides(height: int, width: int, config: EasyRefConfig, size: int) -> list[tuple[int, int]]:
    """Height and width in pixels after each of the two resizes."""
    unit = config.pixels_per_token
    first = target_size(height, width, unit, 4 * unit**2, LARGEST**2 * unit**2)
    return [first, target_size(*first, unit, *pixel_limits(size, unit))]


def pixel_limits(size: int, unit: int = 28) -> tuple[int, int]:
    """Least and most pixels of a resized reference. At 336: 94,864 and 113,680, that is 121 to 145 image tokens."""
    return (size // unit - 1) ** 2 * unit**2, ((size // unit) ** 2 + 1) * unit**2


def target_size(height: int, width: int, unit: int, low: int, high: int) -> tuple[int, int]:
    """Sides in multiples of `unit` with low <= area <= high, the aspect kept as nearly as that allows.

    The area of an image so thin that it would be less than one unit wide may lie above `high`.
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
    """Bytes of n images of one size (n, H, W, 3) -> (n * patches, 1176).

    The four patches of one image token lie together; the still image is doubled into two frames.
    """
    pixels = torch.from_numpy(NORMALISED[images, np.arange(3)])
    frames = repeat(pixels, "n h w c -> n t h w c", t=config.temporal_patch_size)
    return rearrange(
        frames,
        "n t (h mh ph) (w mw pw) c -> (n h w mh mw) (c t ph pw)",
        mh=config.merge_size,
        mw=config.merge_size,
        ph=config.patch_size,
        pw=config.patch_size,
    )


def check_sides(width: int, height: int, name: str) -> None:
    """Raises ValueError for a picture with nothing to see in it, or one that is too thin."""
    if min(width, height) < 14:
        raise ValueError(
            f"{name} is {width}x{height} pixels, smaller than one patch of the vision tower (14x14). "
            "Use a picture with something to see in it."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{name} is {width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other. Crop it."
        )
