"""JSON rows: both file formats, every reason for an invalid row, and skipping."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyref_core.training.rows import Row, read_rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images of 100 x 80 pixels, a text file and a truncated image."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "sub/d.png"):
        Image.effect_noise((100, 80), 50).save(folder / name)
    Image.new("RGB", (10, 10)).save(tmp_path / "outside.png")
    (folder / "text.png").write_text("no image")
    content = (folder / "a.png").read_bytes()
    (folder / "short.png").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (100, 13)).save(folder / "small.png")
    Image.new("RGB", (4000, 15)).save(folder / "thin.png")
    (folder / "chunk.png").write_bytes(content[:60] + bytes(20) + content[80:])  # a broken checksum
    return folder


def write(root: Path, text: str, encoding: str = "utf-8") -> Path:
    path = root.parent / "rows.json"
    path.write_text(text, encoding=encoding)
    return path


def write_list(root: Path, *rows: Any) -> Path:
    """Write a JSON list with row i on line i + 2."""
    return write(root, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def pair(**changes: Any) -> dict[str, Any]:
    """A row; None removes a key."""
    content = {"target": "a.png", "image_file": "b.png", "text": "A dog"} | changes
    return {key: value for key, value in content.items() if value is not None}


def face(*boxes: Any, **changes: Any) -> dict[str, Any]:
    return pair(image_file=None, face=list(boxes)) | changes


def group(*images: str) -> dict[str, Any]:
    return {"images": list(images), "text": "A dog"}


def row(target: str | None, *references: str, texts: Any = ("A dog",), face: Any = None) -> Row:
    return Row(2, target, references, texts, face)


BOX = (10, 10, 40, 50)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pair(), row("a.png", "b.png")),
        (pair(image_file="a.png"), row("a.png", "a.png")),
        (pair(image_file=["a.png"]), row("a.png", "a.png")),
        (pair(image_file=["b.png", "sub/d.png"]), row("a.png", "b.png", "sub/d.png")),
        (pair(text=["A", "B"]), row("a.png", "b.png", texts=("A", "B"))),
        (pair(text=[]), row("a.png", "b.png", texts=("",))),
        (face(BOX), row("a.png", face=BOX)),
        (face([-8.5, 60, 30, 90]), row("a.png", face=(-8.5, 60, 30, 90))),  # over the edge
        (face(BOX, [0, 0, 20, 20]), row("a.png", face=BOX)),
        (face([*BOX, 0.98]), row("a.png", face=BOX)),
        (face([[*BOX, 0.98]]), row("a.png", face=BOX)),
        (face([[*BOX, 0.98], [0, 0, 20, 20, 0.5]]), row("a.png", face=BOX)),
        (face([list(BOX)]), row("a.png", face=BOX)),
        (group("a.png", "b.png"), row(None, "a.png", "b.png")),
    ],
)
def test_valid_row(root: Path, content: Any, expected: Row) -> None:
    assert read_rows(write_list(root, content), root, thorough=True) == [expected]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1], "it is a list of a number, expected an object with target, image_file and text"),
        (pair(target=None), 'no "target"; its keys are: image_file, text'),
        (pair(image_file=None), 'no "image_file"; its keys are: target, text'),
        (pair(text=None), 'no "text"; its keys are: image_file, target'),
        ({}, 'no "target"; its keys are: none'),
        (pair(target=["a.png"]), '"target" is a list of a text, expected a file name'),
        (pair(image_file=7), '"image_file" is a number, expected a file name or a list of file names'),
        (pair(image_file=["b.png", None]), '"image_file" is a list of a text and null, expected a file name'),
        (pair(text={"en": "A"}), '"text" is an object, expected a text or a list of texts'),
        (pair(image_file=[]), '"image_file" is empty, expected at least one file name'),
        (pair(image_file=["b.png", ""]), '"image_file" is empty, expected at least one file name'),
        (pair(target="x.png"), "x.png does not exist under {root}"),
        (pair(image_file=["b.png", "x.png"]), "x.png does not exist under {root}"),
        (pair(image_file="sub"), "sub does not exist under {root}"),
        (pair(target="../outside.png"), "../outside.png is outside the root {root}"),
        (
            pair(image_file=["b.png", "./a.png"]),
            "the target a.png is among its own 2 references; remove it from image_file",
        ),
        (face(), '"face" is empty, expected at least one box [x1, y1, x2, y2]'),
        (face([]), '"face" is empty, expected at least one box [x1, y1, x2, y2]'),
        (face([], [BOX]), '"face" is empty, expected at least one box [x1, y1, x2, y2]'),
        (face([[]]), '"face" contains [], expected boxes [x1, y1, x2, y2] in pixels'),
        (face([[1, 2, 30, 40, 0.9, 7]]), '"face" contains [1, 2, 30, 40, 0.9, 7], expected boxes'),
        (face([[1, 2, 30, 40, "0.9"]]), '"face" contains [1, 2, 30, 40, "0.9"], expected boxes'),
        (face([1, 2]), '"face" contains [1, 2], expected boxes [x1, y1, x2, y2] in pixels'),
        (face(face=[1, 2, 30, 40]), '"face" contains 1, expected boxes [x1, y1, x2, y2] in pixels'),
        (face(["a", 1, 2, 3]), '"face" contains ["a", 1, 2, 3], expected boxes'),
        (face([10**400, 1, 2, 3]), '"face" contains [1000'),
        (face([math.nan, 1, 2, 3]), '"face" contains [NaN, 1, 2, 3], expected boxes'),
        (
            face([40, 10, 10, 50]),
            "the face box [40, 10, 10, 50] is -30x40 pixels, expected x1 < x2, y1 < y2 and sides of",
        ),
        (face([0.1, 0.1, 0.4, 0.5]), "the face box [0.1, 0.1, 0.4, 0.5] is 0.3x0.4 pixels, expected"),
        (face([90, 10, 130, 50]), "the face box [90, 10, 130, 50] is outside its image of 100x80 pixels"),
        (face(BOX, target="text.png"), "text.png cannot be read as an image"),
        (group("a.png"), '"images" lists 1 image, expected at least 2, because one is held out as target'),
        (
            group("a.png", "b.png", "./a.png"),
            '"images" lists a.png 2 times, so as target it would be its own',
        ),
    ],
)
def test_invalid_row_is_reported_by_line_and_reason(root: Path, content: Any, reason: str) -> None:
    path = write_list(root, pair(), content)
    with pytest.raises(ValueError, match="rows") as error:
        read_rows(path, root)
    text = str(error.value)
    assert text.startswith(f"1 of 2 rows of {path} cannot be used; skip_rows allows 0:\n")
    assert f"\n  line 3: {reason.format(root=root)}" in text
    assert text.endswith("\nRepair or remove them, or set skip_rows to 1 to train without them.")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.png", "text.png cannot be read as an image"),
        ("short.png", "short.png cannot be read as an image"),
        ("chunk.png", "chunk.png cannot be read as an image"),
        ("small.png", "small.png is 100x13 pixels, smaller than one patch"),
        ("thin.png", "thin.png is 4000x15 pixels: one side is more than 200 times the other"),
    ],
)
@pytest.mark.parametrize("key", ["target", "image_file"])
def test_thorough_check_finds_every_image_that_training_cannot_use(
    root: Path, key: str, name: str, reason: str
) -> None:
    path = write_list(root, pair(**{key: name}))
    assert len(read_rows(path, root)) == 1
    with pytest.raises(ValueError, match=f"line 2: {reason}"):
        read_rows(path, root, thorough=True)


@pytest.mark.parametrize("apply_exif", [True, False])
def test_faces_are_in_pixels_of_the_image_as_it_is_loaded(root: Path, apply_exif: bool) -> None:
    """A file of 100 x 80 pixels, turned by 90 degrees: upright it is 80 x 100."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((100, 80), 50).save(root / "turned.jpg", exif=exif)
    path = write_list(root, face([60, 80, 78, 98], target="turned.jpg"))
    if apply_exif:
        assert len(read_rows(path, root)) == 1
        return
    with pytest.raises(ValueError, match="is outside its image of 100x80 pixels"):
        read_rows(path, root, apply_exif=False)


def test_row_is_reported_by_its_first_line(root: Path) -> None:
    rows = json.dumps([pair(), pair(), pair(target="x.png")], indent=2)  # 5 lines per row
    with pytest.raises(ValueError, match="line 12: x.png does not exist"):
        read_rows(write(root, rows), root)


def test_json_lines(root: Path) -> None:
    path = write(root, f'{json.dumps(pair())}\n\n{json.dumps(pair())}\n{{"target":\n')
    with pytest.raises(ValueError, match=r"line 4: not JSON \(Expecting value at column"):
        read_rows(path, root)
    assert [row.line for row in read_rows(path, root, skip_rows=1)] == [1, 3]


@pytest.mark.parametrize("start", ["[", ""])
def test_another_encoding_is_named(root: Path, start: str) -> None:
    path = write(root, f'{start}{{"target": "ä.png"}}', "latin-1")
    with pytest.raises(ValueError, match=r"rows.json is not text in UTF-8 .*Save it in UTF-8\.$"):
        read_rows(path, root)


def test_byte_order_mark_is_skipped(root: Path) -> None:
    assert len(read_rows(write(root, json.dumps([pair()]), "utf-8-sig"), root)) == 1


@pytest.mark.parametrize(
    ("tail", "position"),
    [
        ("{}, ]", "Expecting value at line 2, column 5"),
        ("{} {}]", "Expecting ',' or ']' at line 2, column 4"),
        ("{}", "Expecting ',' or ']' at line 2, column 3"),
        ('{"a": }]', "Expecting value at line 2, column 7"),
    ],
)
def test_syntax_error_in_a_list_is_reported_by_position(root: Path, tail: str, position: str) -> None:
    path = write(root, f"[\n{tail}")
    with pytest.raises(ValueError, match="is not a JSON list") as error:
        read_rows(path, root, skip_rows=10)
    assert f"{path} is not a JSON list: {position}. Repair it there, or write one row per" in str(error.value)


def test_skipped_rows_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_list(root, pair(target="x.png"), pair(), pair(target="y.png"))
    with caplog.at_level(logging.WARNING):
        assert [row.line for row in read_rows(path, root, skip_rows=2)] == [3]
    assert "2 of 3 rows" in caplog.text
    assert "line 4: y.png does not exist" in caplog.text
    with pytest.raises(ValueError, match="set skip_rows to 2"):
        read_rows(path, root, skip_rows=1)


def test_only_the_first_invalid_rows_are_listed(root: Path) -> None:
    path = write_list(root, *[pair(target="x.png")] * 13)
    with pytest.raises(ValueError, match="13 of 13 rows") as error:
        read_rows(path, root)
    assert str(error.value).count("line ") == 10
    assert "\n  and 3 more.\n" in str(error.value)


@pytest.mark.parametrize(("rows", "counts"), [([], "0 rows, 0"), ([pair(target="x.png")], "1 rows, 1")])
def test_at_least_one_valid_row_is_required(root: Path, rows: list[Any], counts: str) -> None:
    with pytest.raises(ValueError, match=rf"has no row to train on \({counts} of them invalid\)"):
        read_rows(write_list(root, *rows), root, skip_rows=5)


def test_missing_file_and_missing_root_are_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="The file of rows .*x.json does not exist"):
        read_rows(root / "x.json", root)
    with pytest.raises(FileNotFoundError, match="The image folder .*nowhere does not exist"):
        read_rows(write_list(root), root / "nowhere")
