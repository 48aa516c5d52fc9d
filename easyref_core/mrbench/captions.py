"""Captioned images from a folder with one subfolder for each topic.

A caption is a text file beside the image (`x.jpg`, `x.txt`), or a line of a metadata.jsonl in the folder or
in the topic's: {"file_name": "x.jpg", "text": "a cat", "category": "subject"}. `category` is optional.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..files.image_files import no_reader_reason, sort_files
from .checks import check_fields
from .images import Exclusion

METADATA = "metadata.jsonl"
NO_CATEGORY = "uncategorised"


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a topic."""

    file: Path
    topic: str
    text: str
    category: str


def read_folder(folder: Path, category: str = NO_CATEGORY) -> tuple[list[CaptionedImage], list[Exclusion]]:
    """Return every captioned image, sorted by path, and the images that have no caption or no Pillow reader.

    category: category of the images whose metadata have none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}; wanted one with a subfolder of images for each topic."
        )
    topics = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    common = _read_metadata(folder)
    images, exclusions = [], []
    for topic in topics:
        captions = {**common, **_read_metadata(topic)}
        files = sort_files(path.name for path in sorted(topic.iterdir()))
        exclusions += [
            Exclusion("picture", str(topic / name), no_reader_reason(name)) for name in files.no_reader
        ]
        for file in (topic / name for name in files.readable):
            text, image_category = captions.get(file) or (_text_beside(file), None)
            if text:
                images.append(CaptionedImage(file, topic.name, text, image_category or category))
            else:
                reason = f"no caption: neither {file.stem}.txt nor a line of {METADATA}"
                exclusions.append(Exclusion("picture", str(file), reason))
    if not images and not exclusions:
        raise ValueError(f"{folder} has no images; wanted a subfolder of images for each topic.")
    return images, exclusions


def _text_beside(file: Path) -> str:
    caption = file.with_suffix(".txt")
    # utf-8-sig: Windows editors write a byte order mark
    return caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else ""


def _read_metadata(folder: Path) -> dict[Path, tuple[str, str | None]]:
    """(caption, category) of the images in the folder's metadata.jsonl."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split captions at U+2028
    rows = [_read_line(f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    return {folder / row["file_name"]: (row["text"].strip(), row.get("category")) for row in rows}


def _read_line(where: str, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    check_fields(where, row, {"file_name": str, "text": str}, optional={"category": str})
    return row
