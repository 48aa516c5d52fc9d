"""Training rows of the held-in topics, in the format that `easyref_core.training` reads (training/rows.py).

A method that was trained on them has seen the topics of the held-in split, and images that are references of
its groups, but none of its targets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files.atomic_write import atomic_write_text
from .captions import CaptionedImage

SINGLE, GROUPS = "held_in_single.jsonl", "held_in_groups.jsonl"

Row = Mapping[str, Any]


class TrainingRows(NamedTuple):
    """Rows relative to the folder of the images."""

    single: tuple[Row, ...]  # for stages 1 and 2: each image is its own reference
    groups: tuple[Row, ...]  # for stage 3: each image is the target of others of its topic


def training_rows(folder: Path, images: Sequence[CaptionedImage], size: int) -> TrainingRows:
    """Rows of these images.

    The images of a topic are cut into groups of at most `size`; each image of a group is the target of one
    row, with the others as its references.
    """
    topics: dict[str, list[CaptionedImage]] = {}
    for image in images:
        topics.setdefault(image.topic, []).append(image)

    def row(target: CaptionedImage, references: Sequence[CaptionedImage]) -> Row:
        files = [image.file.relative_to(folder).as_posix() for image in references]
        target_file = target.file.relative_to(folder).as_posix()
        return {"target": target_file, "image_file": files, "text": target.text}

    chunks = [chunk for members in topics.values() for chunk in _chunks(members, size)]
    groups = [
        row(target, [image for image in chunk if image is not target]) for chunk in chunks for target in chunk
    ]
    single = tuple(row(image, [image]) for image in images)
    return TrainingRows(single, tuple(one for one in groups if one["image_file"]))


def write_training_rows(folder: Path, rows: TrainingRows) -> list[Path]:
    """Write each file that has rows, remove one of an earlier build that has none, and return the paths."""
    written = []
    for name, lines in zip((SINGLE, GROUPS), rows, strict=True):
        (folder / name).unlink(missing_ok=True)
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            atomic_write_text(folder / name, text)
            written.append(folder / name)
    return written


def _chunks(members: Sequence[CaptionedImage], size: int) -> list[Sequence[CaptionedImage]]:
    """Parts of at most `size` and about equal length, so that no image is left over alone."""
    count = -(-len(members) // size)
    return [members[i::count] for i in range(count)]
