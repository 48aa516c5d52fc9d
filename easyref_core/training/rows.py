"""Reader and validator of JSON rows; reports each invalid row by line and reason before the first update.

A row has one of these forms:

    {"target": "1.jpg", "image_file": "1.jpg", "text": "A dog"}                 references: a file or a list
    {"target": "1.jpg", "face": [[x1, y1, x2, y2]], "text": ["A man", "Bob"]}   reference: the first face
    {"images": ["1.jpg", "2.jpg", "3.jpg"], "text": "A dog"}                    target: a random image

A face box may end with the detector's score, [x1, y1, x2, y2, score], and boxes may be nested in a list for
each image, [[[x1, y1, x2, y2, score]]], as in the authors' files; the score is not used. Boxes are in pixels
of the image as it is loaded, upright or not (`apply_exif`).

The first two forms are the authors', where the target of a group is fixed. The third is ours: the same group
with another target in each epoch. From a list of texts one is drawn. File names are relative to a root
folder. The file is a JSON list or JSON Lines.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import ExifTags, Image, ImageOps

from ..files.image_files import open_image
from ..utils.images import to_rgb

if TYPE_CHECKING:
    from .config import Data

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

MAX_LISTED = 10  # invalid rows in an error
MAX_COORDINATE = 1e9  # pixels of a face box; excludes infinity, NaN and integers beyond floats
MIN_FACE_PIXELS = 14  # one patch of the vision tower


@dataclass(frozen=True, slots=True)
class Row:
    """A valid row. If `target` is None, the references are a group and one of them is held out as target."""

    line: int
    target: str | None
    references: tuple[str, ...]  # () if the target's face is the reference
    texts: tuple[str, ...]
    face: Box | None = None

    @property
    def where(self) -> str:
        """Its place in the data set, for errors."""
        return f"line {self.line}"


class InvalidRow(ValueError):
    """Reason why a row cannot be used."""


def read_rows(
    path: Path | str, root: Path | str, skip_rows: int = 0, thorough: bool = False, apply_exif: bool = True
) -> list[Row]:
    """Read all valid rows of a file, with image files relative to `root`.

    skip_rows: maximum number of invalid rows to skip. thorough: also load every image as training does.
    apply_exif: see `load_image`; face boxes are in pixels of that image. Raises ValueError if more rows are
    invalid, listing the first ones, or if no row is valid.
    """
    return list(valid_rows(path, root, skip_rows, thorough, apply_exif))


def valid_rows(
    path: Path | str, root: Path | str, skip_rows: int = 0, thorough: bool = False, apply_exif: bool = True
) -> Iterator[Row]:
    """Yield the rows of `read_rows` one by one; the errors of invalid rows are raised after the last one."""
    path, root = Path(path), Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"The image folder {root} does not exist. Set data.root to it.")
    valid, invalid = 0, []
    for line, content in parse(path):
        try:
            row = check(content, line, root, thorough, apply_exif)
        except InvalidRow as reason:
            invalid.append((line, str(reason)))
        else:
            valid += 1
            yield row
    total = valid + len(invalid)
    if len(invalid) > skip_rows:
        raise ValueError(_summary(path, invalid, total, skip_rows))
    if not valid:
        raise ValueError(f"{path} has no row to train on ({total} rows, {len(invalid)} of them invalid).")
    if invalid:
        log.warning("%s", _summary(path, invalid, total, skip_rows))


def count_rows(data: Data) -> str:
    """Read and check the rows of a run's data and describe them by number and kind.

    Raises FileNotFoundError or ValueError as `read_rows` does.
    """
    if data.rows is None:
        return "the images are procedural, so there are no rows to check"
    count = groups = faces = largest = 0
    for row in valid_rows(data.rows, data.root, data.skip_rows, data.thorough, data.apply_exif):
        count += 1
        groups += len(row.references) > 1
        faces += row.face is not None
        largest = max(largest, len(row.references))
    return (
        f"{count} rows of {data.rows} can be used: {groups} groups (at most {largest} images), {faces} "
        f"faces, {count - groups - faces} single references"
    )


def _summary(path: Path, invalid: list[tuple[int, str]], total: int, skip_rows: int) -> str:
    lines = [f"{len(invalid)} of {total} rows of {path} cannot be used; skip_rows allows {skip_rows}:"]
    lines += [f"  line {line}: {reason}" for line, reason in invalid[:MAX_LISTED]]
    if len(invalid) > MAX_LISTED:
        lines.append(f"  and {len(invalid) - MAX_LISTED} more.")
    if len(invalid) > skip_rows:
        lines.append(f"Repair or remove them, or set skip_rows to {len(invalid)} to train without them.")
    return "\n".join(lines)


def parse(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (first line, content) of every row; content is an InvalidRow for a syntax error in JSON Lines.

    Raises ValueError for a JSON list with a syntax error, because the rows after it cannot be separated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The file of rows {path} does not exist. Set data.rows to it.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            yield from _parse_list(path, file.read()) if start == "[" else _parse_lines(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Save it in UTF-8.") from error


def _parse_lines(lines: Iterator[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, InvalidRow(f"not JSON ({error.msg} at column {error.colno})")


def _parse_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Decode row by row, because json.load gives no lines."""

    def skip_space(position: int) -> int:
        return re.compile(r"\s*").match(text, position).end()

    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = skip_space(text.index("[") + 1)
    if text.startswith("]", position):
        return
    try:
        while True:
            line, counted = line + text.count("\n", counted, position), position
            content, end = decoder.raw_decode(text, position)
            yield line, content
            position = skip_space(end)
            if text.startswith("]", position):
                return
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = skip_space(position + 1)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a JSON list: {error.msg} at line {error.lineno}, column {error.colno}. Repair it "
            "there, or write one row per line (JSON Lines), where an invalid row does not affect the others."
        ) from error


def check(content: Any, line: int, root: Path, thorough: bool = False, apply_exif: bool = True) -> Row:
    """Return the row that `content` describes. Raises InvalidRow with the reason if it cannot be used."""
    if isinstance(content, InvalidRow):
        raise content
    if not isinstance(content, dict):
        raise InvalidRow(f"it is {_kind(content)}, expected an object with target, image_file and text")
    row = _group(content, line) if "images" in content else _pair(content, line)
    files = dict.fromkeys((*([row.target] if row.target else []), *row.references))
    for file in files:
        _check_file(file, root)
    if row.face:
        _check_face(row.face, image_size(root / row.target, row.target, apply_exif))
    if thorough:
        for file in files:
            load_image(root, file, apply_exif)
    return row


def _pair(content: dict[str, Any], line: int) -> Row:
    """Parse a row with a target."""
    target = _required(content, "target")
    if not isinstance(target, str) or not target:
        raise InvalidRow(f'"target" is {_kind(target)}, expected a file name')
    texts = _texts(content)
    if "face" in content:
        return Row(line, target, (), texts, _faces(content["face"])[0])
    references = _files(content, "image_file")
    # Stages 1 and 2 train with the target as its only reference; in a group it would give the answer away.
    if len(references) > 1 and os.path.normpath(target) in map(os.path.normpath, references):
        raise InvalidRow(
            f"the target {target} is among its own {len(references)} references; remove it from image_file"
        )
    return Row(line, target, references, texts)


def _group(content: dict[str, Any], line: int) -> Row:
    """Parse a row without a target."""
    images = _files(content, "images")
    if len(images) < 2:
        raise InvalidRow('"images" lists 1 image, expected at least 2, because one is held out as target')
    [(file, count)] = Counter(map(os.path.normpath, images)).most_common(1)
    if count > 1:
        raise InvalidRow(f'"images" lists {file} {count} times, so as target it would be its own reference')
    return Row(line, None, images, _texts(content))


def _required(content: dict[str, Any], key: str) -> Any:
    if key not in content:
        raise InvalidRow(f'no "{key}"; its keys are: {", ".join(sorted(content)) or "none"}')
    return content[key]


def _files(content: dict[str, Any], key: str) -> tuple[str, ...]:
    value = _required(content, key)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidRow(f'"{key}" is {_kind(value)}, expected a file name or a list of file names')
    if not names or not all(names):
        raise InvalidRow(f'"{key}" is empty, expected at least one file name')
    return tuple(names)


def _texts(content: dict[str, Any]) -> tuple[str, ...]:
    value = _required(content, "text")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRow(f'"text" is {_kind(value)}, expected a text or a list of texts')
    return tuple(texts) or ("",)  # the authors treat an empty list as an empty text too


def _faces(value: Any) -> list[Box]:
    def finite(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < MAX_COORDINATE

    boxes = value if isinstance(value, list) else [value]
    if boxes and isinstance(boxes[0], list) and (not boxes[0] or isinstance(boxes[0][0], list)):
        boxes = boxes[0]  # a list of boxes for each image; the first is the target
    if not boxes:
        raise InvalidRow('"face" is empty, expected at least one box [x1, y1, x2, y2]')
    for box in boxes:
        if not isinstance(box, list) or len(box) not in (4, 5) or not all(map(finite, box)):
            raise InvalidRow(f'"face" contains {json.dumps(box)}, expected boxes [x1, y1, x2, y2] in pixels')
    return [tuple(box[:4]) for box in boxes]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        kinds = " and ".join(sorted({_kind(item) for item in value}))
        return f"a list of {kinds}" if kinds else "an empty list"
    names = {dict: "an object", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _check_file(file: str, root: Path) -> None:
    path = os.path.normpath(root / file)
    # symbolic links are not resolved, because data sets are often folders of links
    if not Path(path).is_relative_to(os.path.normpath(root)):
        raise InvalidRow(f"{file} is outside the root {root}")
    if not os.path.isfile(path):
        raise InvalidRow(f"{file} does not exist under {root}")


def _check_face(face: Box, size: tuple[int, int]) -> None:
    """Check the size, and that the center is inside; detectors' boxes may cross the edge."""
    (x1, y1, x2, y2), (width, height) = face, size
    if min(x2 - x1, y2 - y1) < MIN_FACE_PIXELS:
        raise InvalidRow(
            f"the face box {list(face)} is {x2 - x1:g}x{y2 - y1:g} pixels, expected x1 < x2, y1 < y2 "
            f"and sides of at least {MIN_FACE_PIXELS} pixels"
        )
    if not (0 <= (x1 + x2) / 2 <= width and 0 <= (y1 + y2) / 2 <= height):
        raise InvalidRow(f"the face box {list(face)} is outside its image of {width}x{height} pixels")


def load_image(root: Path, file: str, apply_exif: bool = True) -> Image.Image:
    """Load an image file as RGB. Raises InvalidRow as `decode_image` does."""
    return decode_image(root / file, file, apply_exif)


def decode_image(source: Path | BinaryIO, name: str, apply_exif: bool = True) -> Image.Image:
    """Decode an image as RGB. Raises InvalidRow if it cannot be decoded, or is too small or too thin.

    apply_exif: turn it upright by its EXIF orientation, as the nodes and MRBench do. The authors' code does
    not. name: in errors.
    """
    try:
        with open_image(source) as image:
            image = ImageOps.exif_transpose(image) if apply_exif else image
            image.load()
    # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on foreign
    # bytes.
    except Exception as error:
        raise _unreadable(name, error) from error
    try:
        return to_rgb(image, name)
    except ValueError as error:
        raise InvalidRow(str(error)) from error


def image_size(source: Path | BinaryIO, name: str, apply_exif: bool) -> tuple[int, int]:
    """Width and height of `decode_image`, mostly from the file's header alone."""
    try:
        with open_image(source) as image:
            turned = apply_exif and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> InvalidRow:
    return InvalidRow(f"{name} cannot be read as an image ({error or type(error).__name__})")
