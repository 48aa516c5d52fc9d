"""The largest size at which a group fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import comfy.model_management as mm

if TYPE_CHECKING:
    from torch import Tensor

    from ..host.hosted_model import HostedEasyRef

USABLE_MEMORY = 0.8  # fraction of the device, for activations alone: weights may stay outside and be streamed


def image_sizes(references: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return width and height of each reference (1, height, width, C)."""
    return [(image.shape[2], image.shape[1]) for image in references]


def usable_memory(easyref: HostedEasyRef) -> int:
    """Return the bytes one encoding may use. All memory of the device counts, because the host frees some."""
    return int(USABLE_MEMORY * mm.get_total_memory(easyref.model.device))


def fitting_size(
    easyref: HostedEasyRef, sizes: Sequence[tuple[int, int]], prompt: str, instruction: str, size: int
) -> int:
    """Return the largest size up to `size` at which a group fits; `size` if none, so that encoding fails."""
    return easyref.model.largest_size(sizes, prompt, instruction, size, usable_memory(easyref)) or size
