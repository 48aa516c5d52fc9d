"""Notes that nodes show after a run about what they were given. They stop nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ...easyref_core.inspect.duplicates import Fingerprint, Pair, fingerprint, repeats
from ...easyref_core.utils.lru_cache import ByteLRUCache
from ...easyref_core.utils.prompt_syntax import plain_text

if TYPE_CHECKING:
    from ...easyref_core.mllm.prefix_cache import PreparedGroup

BLACK = 8  # of 255; noise of a compressed black image stays below
PRINT_BYTES = 1024  # of a fingerprint, about
# By the digest of a reference's pixels: another prompt does not compare the images again.
_prints: ByteLRUCache[Fingerprint] = ByteLRUCache(2**20)


def read_prompt(prompt: str) -> tuple[str, list[str]]:
    """The plain text of a prompt, and a note that shows it where it differs.

    Raises ValueError for a choice {a|b} that was not made.
    """
    text = plain_text(prompt)
    if text == prompt:
        return text, []
    return text, [f"The MLLM reads the prompt without the syntax of SDXL's text encoders: {text}"]


def empty_prompt_note(text: str) -> str | None:
    """A warning of a prompt of which nothing is left to read."""
    if text.strip():
        return None
    return "Warning: the prompt is empty. EasyRef works best with the prompt that SDXL's text encoders read."


def window_note(start: float, end: float) -> str | None:
    """A warning where the references never act, because start_percent is not before end_percent."""
    if start < end:
        return None
    return (
        f"Warning: start_percent is {start:g} and end_percent is {end:g}, so the references never act. Set "
        "start_percent below end_percent."
    )


def image_notes(group: PreparedGroup) -> list[str]:
    """Warnings of black references and of duplicates in a group, compared as the MLLM reads them."""
    prints = {}
    for number, image in enumerate(group.images, start=1):
        if image.digest not in _prints:
            _prints.put(image.digest, fingerprint(Image.fromarray(image.pixels)), PRINT_BYTES)
        prints[number] = _prints.get(image.digest)
    black = [number for number, image in enumerate(group.images, start=1) if image.pixels.max() <= BLACK]
    return [*black_notes(black), *duplicate_notes(repeats(prints))]


def black_notes(numbers: Sequence[int]) -> list[str]:
    """A warning for each of the black references, which count from 1."""
    return [
        f"Warning: reference {number} is black, as the unconditional side's image is. Remove it from the group."
        for number in numbers
    ]


def duplicate_notes(pairs: Iterable[Pair]) -> list[str]:
    """A warning for each reference that repeats an earlier one."""
    return [
        f"Warning: reference {pair.second} {'is the same picture as' if pair.same else 'looks nearly like'} "
        f"reference {pair.first}."
        for pair in pairs
    ]
