"""Image files of a benchmark: loading, saving, and a record of those that were left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..files.atomic_write import atomic_write
from ..files.image_files import open_image


class BrokenImage(ValueError):
    """An image file that is missing or cannot be decoded; the text is the reason, without the file name."""


@dataclass(frozen=True)
class Exclusion:
    """Something that was left out of a benchmark; the fields are the columns of excluded.csv."""

    what: str  # "reference", "target", "group", "picture", "file" or "topic"
    name: str  # the file's path, the group's id or the topic
    reason: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}: {self.reason}"


def load_image(path: Path) -> Image.Image:
    """Load an image as upright RGB.

    Raises BrokenImage if the file does not exist or does not decode to its end.
    """
    if not path.is_file():
        raise BrokenImage("there is no such file")
    try:
        with open_image(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on foreign
    # bytes.
    except Exception as error:
        raise BrokenImage(f"it cannot be decoded as an image ({type(error).__name__}: {error})") from error


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG")


def describe(exclusions: Sequence[Exclusion]) -> str:
    """List the exclusions, one a line, under their count; "" if there are none."""
    if not exclusions:
        return ""
    return "\n".join([f"{len(exclusions)} excluded:", *(f"  {exclusion}" for exclusion in exclusions)])
