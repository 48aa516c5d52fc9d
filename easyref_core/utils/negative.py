"""The picture that the unconditional side reads in place of references: black, as in training, or noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..mllm.preprocess import black_image


def noise_image(seed: int, strength: float) -> Image.Image:
    """Even noise in every channel, of the size of the black image, from 0 to strength * 255; strength 0 is the black one.

    seed: 0 to 2**64 - 1; the same picture on every machine. Raises ValueError for a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"The strength of the noise is {strength:g}; wanted 0 (black) to 1.")
    width, height = black_image().size
    count = width * height * 3
    # The raw bits: unlike the distributions on top of them, numpy promises that they stay the same.
    noise = np.random.PCG64(seed).random_raw(count // 8).astype("<u8").view(np.uint8)
    return Image.fromarray((noise.reshape(height, width, 3) * strength).round().astype(np.uint8))
