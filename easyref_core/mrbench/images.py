"""Picture files: opened in one way everywhere, and named when they are broken."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..files.image_files import open_image


class BrokenPicture(ValueError):
    """A picture file that is missing or cannot be read; its text is the reason, without the file's name."""


@dataclass(frozen=True)
class Exclusion:
    """Something that was left out of a benchmark, and why."""

    what: str  # "reference", "target", "group", "picture", "caption", "topic"
    name: str  # the file's path, the group's id or the topic
    reason: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}: {self.reason}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def open_picture(path: Path) -> Image.Image:
    """The picture as RGB, upright. Raises BrokenPicture where there is none or it does not decode to its end."""
    if not path.is_file():
        raise BrokenPicture("there is no such file")
    try:
        with open_image(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on foreign bytes.
    except Exception as error:
        raise BrokenPicture(f"it cannot be read as a picture ({type(error).__name__}: {error})") from error


def describe(exclusions: tuple[Exclusion, ...]) -> str:
    """What was left out, one a line, under its count; "" when nothing was."""
    if not exclusions:
        return ""
    return "\n".join([f"{len(exclusions)} excluded:", *(f"  {exclusion}" for exclusion in exclusions)])
