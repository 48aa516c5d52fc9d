"""Notes on a node's inputs, shown after a run. They do not stop it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ...easyref_core.inspect.duplicates import Fingerprint, Pair, fingerprint, repeats
from ...easyref_core.utils.lru_cache import ByteLRUCache
from ...easyref_core.utils.prompt_syntax import plain_text

if TYPE_CHECKING:
    from torch import Tensor

    from ...easyref_core.mllm.prefix_cache import PreparedGroup

MAX_BLACK = 8  # of 255; noise of a compressed black image stays below
FINGERPRINT_BYTES = 1024  # approximate
# by the digest of a reference's pixels, so that another prompt does not compute them again
_fingerprints: ByteLRUCache[Fingerprint] = ByteLRUCache(2**20)


def read_prompt(prompt: str) -> tuple[str, list[str]]:
    """The plain text of a prompt, and a note that shows it where it differs.

    Raises ValueError for an unresolved choice {a|b}.
    """
    text = plain_text(prompt)
    if text == prompt:
        return text, []
    return text, [f"The MLLM reads the prompt without the syntax of SDXL's text encoders: {text}"]


def empty_prompt_note(text: str) -> str | None:
    """A warning if the plain text of a prompt is empty."""
    if text.strip():
        return None
    return "Warning: the prompt is empty. EasyRef works best with the prompt that SDXL's text encoders read."


def window_note(start: float, end: float) -> str | None:
    """A warning if the references never act, because start_percent is not below end_percent."""
    if start < end:
        return None
    return (
        f"Warning: start_percent is {start:g} and end_percent is {end:g}, so the references never act. Set "
        "start_percent below end_percent."
    )


def image_notes(group: PreparedGroup) -> list[str]:
    """Warnings of black references and of duplicates in a group, compared at the MLLM's input size."""
    fingerprints = {}
    for number, image in enumerate(group.images, start=1):
        if image.digest not in _fingerprints:
            _fingerprints.put(image.digest, fingerprint(Image.fromarray(image.pixels)), FINGERPRINT_BYTES)
        fingerprints[number] = _fingerprints.get(image.digest)
    black = [number for number, image in enumerate(group.images, start=1) if image.pixels.max() <= MAX_BLACK]
    return [*black_notes(black), *duplicate_notes(repeats(fingerprints))]


def black_notes(numbers: Sequence[int]) -> list[str]:
    """A warning for each black reference; numbers count from 1."""
    return [
        f"Warning: reference {number} is black, as the unconditional side's image is. Remove it from the "
        "group."
        for number in numbers
    ]


def mask_notes(masks: Iterable[Tensor | None]) -> list[str]:
    """A warning for each mask of a reference that marks nothing; None is a reference without a mask."""
    return [
        f"Warning: the mask of reference {number} marks nothing, so nothing of it counts. Load Image gives "
        "such a mask for an image without a painted or transparent part."
        for number, mask in enumerate(masks, start=1)
        if mask is not None and not (mask > 0).any()
    ]


def duplicate_notes(pairs: Iterable[Pair]) -> list[str]:
    """A warning for each reference that repeats an earlier one."""
    return [
        f"Warning: reference {pair.second} {'is the same picture as' if pair.same else 'looks nearly like'} "
        f"reference {pair.first}."
        for pair in pairs
    ]
