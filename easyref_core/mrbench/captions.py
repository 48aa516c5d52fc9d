"""A folder of captioned images, one subfolder a topic, as a list of images.

A caption is a text file of the image's name beside it (`x.jpg`, `x.txt`), or a line of a metadata.jsonl in the folder
or in the topic's: {"file_name": "x.jpg", "text": "a cat", "category": "subject"}. `category` may be left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..files.image_files import no_reader_reason, sort_files
from .images import Exclusion

METADATA = "metadata.jsonl"
METADATA_KEYS = {"file_name", "text", "category"}
NO_CATEGORY = "uncategorised"


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a topic."""

    file: Path
    topic: str
    text: str
    category: str


def read_folder(folder: Path, category: str = NO_CATEGORY) -> tuple[list[CaptionedImage], list[Exclusion]]:
    """Every captioned image, sorted by path; and the images without a caption or of a format that Pillow cannot read.

    category: of images that name none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}; wanted one with a subfolder of images for each topic."
        )
    topics = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    known = _read_metadata(folder)
    images, exclusions = [], []
    for topic in topics:
        captions = {**known, **_read_metadata(topic)}
        found = sort_files(path.name for path in sorted(topic.iterdir()))
        exclusions += [
            Exclusion("picture", str(topic / name), no_reader_reason(name)) for name in found.no_reader
        ]
        for file in (topic / name for name in found.readable):
            text, own = captions.get(file) or (_text_beside(file), None)
            if text:
                images.append(CaptionedImage(file, topic.name, text, own or category))
            else:
                why = f"no caption: neither {file.stem}.txt nor a line of {METADATA}"
                exclusions.append(Exclusion("picture", str(file), why))
    if not images and not exclusions:
        raise ValueError(f"{folder} holds no image; wanted a subfolder of images for each topic.")
    return images, exclusions


def _text_beside(file: Path) -> str:
    caption = file.with_suffix(".txt")
    # Windows editors put a mark first
    return caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else ""


def _read_metadata(folder: Path) -> dict[Path, tuple[str, str | None]]:
    """(caption, category) of the images that the folder's metadata.jsonl names."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also parts captions, at U+2028
    rows = [_read_line(f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    return {folder / row["file_name"]: (row["text"].strip(), row.get("category")) for row in rows}


def _read_line(where: str, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys() <= METADATA_KEYS:
        raise ValueError(
            f"{where} is {line[:80]}; wanted an object of file_name, text and, if wanted, category."
        )
    if wrong := [key for key, value in row.items() if not isinstance(value, str)]:
        raise ValueError(f"{where}: {wrong[0]} is {row[wrong[0]]!r}; wanted a string.")
    return row
