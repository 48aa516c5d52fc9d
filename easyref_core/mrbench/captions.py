"""Captioned images from a folder with one subfolder for each topic.

A caption is a text file beside the image (`x.jpg`, `x.txt`), or a line of a metadata.jsonl in the folder or
in the topic's: {"file_name": "x.jpg", "text": "a cat", "category": "subject"}. `category` is optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..files.image_files import no_reader_reason, sort_files
from .checks import check_fields
from .images import Exclusion

METADATA = "metadata.jsonl"
NO_CATEGORY = "uncategorised"
TEXT_SUFFIXES = frozenset({".txt", ".json", ".jsonl"})  # captions and metadata


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a topic."""

    file: Path
    topic: str
    text: str
    category: str


def read_folder(
    folder: Path, category: str = NO_CATEGORY, flat: bool = False
) -> tuple[list[CaptionedImage], list[Exclusion]]:
    """Return every captioned image, sorted by path, and everything that was left out.

    Left out are images without a caption or a Pillow reader, files that are not images by their name, folders
    inside a topic, and, unless `flat`, images beside the topics.

    Args:
        category: category of the images whose metadata have none.
        flat: read the images beside the topics too, each as a topic of its own.

    Raises FileNotFoundError if there is no folder, and ValueError if it has no image in a topic.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}; wanted one with a subfolder of images for each topic."
        )
    topics = [path for path in _entries(folder) if path.is_dir()]
    common = _read_metadata(folder)
    stray = [path for path in _entries(folder) if path.is_file() and _is_image(path)]
    images, exclusions = [], []
    if flat:
        images, exclusions = _read_files(stray, common, category)
        images = [replace(image, topic=image.file.stem) for image in images]
    elif stray and not any(_is_image(file) for topic in topics for file in topic.rglob("*")):
        raise ValueError(
            f"{folder} has {len(stray)} images and no subfolder with images; wanted a subfolder for each "
            "topic. Move the images of each topic into a folder of its own, or use --single, which needs no "
            "topics."
        )
    else:
        reason = "it is beside the topics; move it into the folder of its topic"
        exclusions = [Exclusion("picture", str(file), reason) for file in stray]
    for topic in topics:
        files = [path for path in _entries(topic) if path.is_file()]
        of_topic, left_out = _read_files(files, {**common, **_read_metadata(topic)}, category)
        images += of_topic
        exclusions += [*left_out, *_nested(topic)]
    if not images and not exclusions:
        raise ValueError(f"{folder} has no images; wanted a subfolder of images for each topic.")
    return images, exclusions


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image(file: Path) -> bool:
    return not sort_files([file.name]).other


def _read_files(
    files: Iterable[Path], captions: Mapping[Path, tuple[str, str | None]], category: str
) -> tuple[list[CaptionedImage], list[Exclusion]]:
    """The captioned images among some files of one topic."""
    images, exclusions = [], []
    for file in files:
        kinds = sort_files([file.name])
        if kinds.no_reader:
            exclusions.append(Exclusion("picture", str(file), no_reader_reason(file.name)))
        elif kinds.other:
            if file.suffix.lower() not in TEXT_SUFFIXES:
                exclusions.append(Exclusion("file", str(file), "its name is not that of an image or caption"))
        else:
            text, image_category = captions.get(file) or (_text_beside(file), None)
            if text:
                images.append(CaptionedImage(file, file.parent.name, text, image_category or category))
            else:
                reason = f"no caption: neither {file.stem}.txt nor a line of {METADATA}"
                exclusions.append(Exclusion("picture", str(file), reason))
    return images, exclusions


def _nested(topic: Path) -> list[Exclusion]:
    """Images in folders inside a topic."""
    reason = f"it is in a folder inside topic {topic.name}; move it into {topic}"
    return [
        Exclusion("picture", str(file), reason)
        for file in sorted(topic.rglob("*"))
        if file.parent != topic and file.is_file() and _is_image(file)
    ]


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
