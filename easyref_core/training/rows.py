"""The authors' JSON rows, read and checked before a run starts: a broken row is named by its line and its reason.

A row is one of

    {"target": "1.jpg", "image_file": "1.jpg", "text": "A dog"}                 references given: one file or a list
    {"target": "1.jpg", "face": [[x1, y1, x2, y2]], "text": ["A man", "Bob"]}   the target's first face is the reference
    {"images": ["1.jpg", "2.jpg", "3.jpg"], "text": "A dog"}                    a group; one at random is held out

The first two are the authors'. In theirs the held-out picture of a group is fixed: it is the row's target. The third is
ours: the same group with another target each time it comes round. Of several texts one is drawn. Files are relative to
a root folder. The file is a JSON list, or JSON Lines.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..files.image_files import open_image

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

SHOWN = 10  # broken rows an error lists
SMALLEST_FACE = 14  # pixels; less is smaller than one patch of the vision tower


@dataclass(frozen=True, slots=True)
class Row:
    """One good row. `target` None: the references are a group, of which one is held out as target."""

    line: int
    target: str | None
    references: tuple[str, ...]  # () where the target's face is the reference
    texts: tuple[str, ...]
    face: Box | None = None


class BrokenRow(ValueError):
    """Why a row cannot be used."""


def read_rows(path: Path | str, root: Path | str, skip_rows: int = 0, thorough: bool = False) -> list[Row]:
    """All good rows of a file, their pictures under `root`.

    skip_rows: how many broken rows may be left out. thorough: also decode every picture, which reads all of them once.
    Raises ValueError where more rows are broken, naming the first ones, and where no good row is left.
    """
    path, root = Path(path), Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The pictures' folder {root} does not exist. Set the data's root to it.")
    rows: list[Row] = []
    broken: list[tuple[int, str]] = []
    for line, content in parse(path):
        try:
            rows.append(check(content, line, root, thorough))
        except BrokenRow as reason:
            broken.append((line, str(reason)))
    total = len(rows) + len(broken)
    if len(broken) > skip_rows:
        raise ValueError(_summary(path, broken, total, skip_rows))
    if not rows:
        raise ValueError(f"{path} holds no row to train on ({total} rows, {len(broken)} of them broken).")
    if broken:
        log.warning("%s", _summary(path, broken, total, skip_rows))
    return rows


def _summary(path: Path, broken: list[tuple[int, str]], total: int, skip_rows: int) -> str:
    lines = [f"{len(broken)} of {total} rows of {path} cannot be used; {skip_rows} may be skipped:"]
    lines += [f"  line {line}: {reason}" for line, reason in broken[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"  and {len(broken) - SHOWN} more.")
    if len(broken) > skip_rows:
        lines.append(f"Mend or remove them, or set skip_rows to {len(broken)} to train without them.")
    return "\n".join(lines)


def parse(path: Path) -> Iterator[tuple[int, Any]]:
    """(line on which the row starts, its content) for every row; content is a BrokenRow where the line is no JSON.

    Raises ValueError for a JSON list with a syntax error: what follows it cannot be told apart.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The rows' file {path} does not exist.")
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        yield from _parse_list(path, file.read()) if start == "[" else _parse_lines(file)


def _parse_lines(lines: Iterator[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, BrokenRow(f"not JSON ({error.msg} at column {error.colno})")


def _parse_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Row by row, for the lines; json.load would tell none."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = _skip_space(text, text.index("[") + 1)
    if text.startswith("]", place):
        return
    try:
        while True:
            line, counted = line + text.count("\n", counted, place), place
            content, end = decoder.raw_decode(text, place)
            yield line, content
            place = _skip_space(text, end)
            if text.startswith("]", place):
                return
            if not text.startswith(",", place):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place = _skip_space(text, place + 1)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON list: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Mend it there, or write one row a line (JSON Lines), where a broken row harms no other."
        ) from error


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def check(content: Any, line: int, root: Path, thorough: bool = False) -> Row:
    """The row that `content` describes. Raises BrokenRow with the reason where it cannot be used."""
    if isinstance(content, BrokenRow):
        raise content
    if not isinstance(content, dict):
        raise BrokenRow(f"it is {_kind(content)}; wanted an object with target, image_file and text")
    row = _group(content, line) if "images" in content else _pair(content, line)
    files = dict.fromkeys((*([row.target] if row.target else []), *row.references))
    for file in files:
        _check_file(file, root)
    if row.face:
        _check_face(row.face, _size(root, row.target))
    if thorough:
        for file in files:
            _decode(root, file)
    return row


def _pair(content: dict[str, Any], line: int) -> Row:
    """A row with its own target."""
    target = _wanted(content, "target")
    if not isinstance(target, str) or not target:
        raise BrokenRow(f'"target" is {_kind(target)}; wanted the name of a file')
    texts = _texts(content)
    if "face" in content:
        return Row(line, target, (), texts, _faces(content["face"])[0])
    references = _files(content, "image_file")
    # One reference that is the target is how stages 1 and 2 train; in a group the target would give itself away.
    if len(references) > 1 and _normal(target) in map(_normal, references):
        raise BrokenRow(
            f"the target {target} is among its own {len(references)} references: take it out of image_file"
        )
    return Row(line, target, references, texts)


def _group(content: dict[str, Any], line: int) -> Row:
    """A row of which one picture is held out."""
    images = _files(content, "images")
    if len(images) < 2:
        raise BrokenRow('"images" lists 1 picture; wanted at least 2, one of them is held out as target')
    [(twice, count)] = Counter(map(_normal, images)).most_common(1)
    if count > 1:
        raise BrokenRow(
            f'"images" lists {twice} {count} times: held out, it would be among its own references'
        )
    return Row(line, None, images, _texts(content))


def _wanted(content: dict[str, Any], key: str) -> Any:
    if key not in content:
        raise BrokenRow(f'no "{key}"; it has {", ".join(sorted(content)) or "nothing"}')
    return content[key]


def _files(content: dict[str, Any], key: str) -> tuple[str, ...]:
    value = _wanted(content, key)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BrokenRow(f'"{key}" is {_kind(value)}; wanted the name of a file, or a list of names')
    if not names or not all(names):
        raise BrokenRow(f'"{key}" is empty; wanted at least one file')
    return tuple(names)


def _texts(content: dict[str, Any]) -> tuple[str, ...]:
    value = _wanted(content, "text")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BrokenRow(f'"text" is {_kind(value)}; wanted a text, or a list of texts')
    return tuple(texts) or ("",)  # an empty list is an empty text to the authors too


def _faces(value: Any) -> list[Box]:
    def number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

    boxes = value if isinstance(value, list) else [value]
    if not boxes:
        raise BrokenRow('"face" is empty; wanted at least one box [x1, y1, x2, y2]')
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
            raise BrokenRow(f'"face" holds {json.dumps(box)}; wanted boxes [x1, y1, x2, y2] in pixels')
    return [tuple(box) for box in boxes]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        kinds = " and ".join(sorted({_kind(item) for item in value}))
        return f"a list that holds {kinds}" if kinds else "an empty list"
    names = {dict: "an object", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _normal(file: str) -> str:
    return os.path.normpath(file)


def _check_file(file: str, root: Path) -> None:
    path = os.path.normpath(root / file)
    # by name, not by where links lead: folders of links are a usual way to put a data set together
    if not Path(path).is_relative_to(os.path.normpath(root)):
        raise BrokenRow(f"{file} lies outside the root {root}")
    if not os.path.isfile(path):
        raise BrokenRow(f"{file} does not exist under {root}")


def _check_face(face: Box, size: tuple[int, int]) -> None:
    """The box may reach over the edge, as detectors' boxes do; its middle may not."""
    (x1, y1, x2, y2), (width, height) = face, size
    if min(x2 - x1, y2 - y1) < SMALLEST_FACE:
        raise BrokenRow(
            f"the face box {list(face)} is {x2 - x1:g}x{y2 - y1:g} pixels; wanted x1 < x2, y1 < y2 "
            f"and at least {SMALLEST_FACE} pixels a side"
        )
    if not (0 <= (x1 + x2) / 2 <= width and 0 <= (y1 + y2) / 2 <= height):
        raise BrokenRow(f"the face box {list(face)} lies outside its picture of {width}x{height} pixels")


def _size(root: Path, file: str) -> tuple[int, int]:
    try:
        with open_image(root / file) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenRow(f"{file} cannot be read as a picture ({error})") from error


def _decode(root: Path, file: str) -> None:
    try:
        with open_image(root / file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenRow(f"{file} cannot be read as a picture ({error})") from error
