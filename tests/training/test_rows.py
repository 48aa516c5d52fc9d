"""The authors' rows: both file forms, every reason a row can be broken for, and how many a run may skip."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyref_core.training.rows import Row, read_rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pictures, 100 x 80 pixels, beside one that is none and one that is cut short."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "sub/d.png"):
        Image.effect_noise((100, 80), 50).save(folder / name)
    Image.new("RGB", (10, 10)).save(tmp_path / "outside.png")
    (folder / "text.png").write_text("no picture")
    whole = (folder / "a.png").read_bytes()
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    return folder


def write_list(root: Path, rows: list[Any]) -> Path:
    """A JSON list, row number i on line i + 2."""
    path = root.parent / "rows.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return path


def write_lines(root: Path, text: str) -> Path:
    path = root.parent / "rows.jsonl"
    path.write_text(text)
    return path


def pair(**changes: Any) -> dict[str, Any]:
    return {"target": "a.png", "image_file": "b.png", "text": "A dog"} | changes


def without(key: str) -> dict[str, Any]:
    row = pair()
    del row[key]
    return row


def face(*boxes: Any) -> dict[str, Any]:
    return {"target": "a.png", "text": "A man", "face": list(boxes)}


GOOD = {
    "one file": (pair(), Row(2, "a.png", ("b.png",), ("A dog",))),
    "its own reference": (pair(image_file="a.png"), Row(2, "a.png", ("a.png",), ("A dog",))),
    "its own reference, in a list": (pair(image_file=["a.png"]), Row(2, "a.png", ("a.png",), ("A dog",))),
    "several": (pair(image_file=["b.png", "sub/d.png"]), Row(2, "a.png", ("b.png", "sub/d.png"), ("A dog",))),
    "texts": (pair(text=["A", "B"]), Row(2, "a.png", ("b.png",), ("A", "B"))),
    "no text": (pair(text=[]), Row(2, "a.png", ("b.png",), ("",))),
    "face": (face([10, 10, 40, 50]), Row(2, "a.png", (), ("A man",), (10, 10, 40, 50))),
    "face over the edge": (face([-8.5, 60, 30, 90]), Row(2, "a.png", (), ("A man",), (-8.5, 60, 30, 90))),
    "first face": (face([10, 10, 40, 50], [0, 0, 20, 20]), Row(2, "a.png", (), ("A man",), (10, 10, 40, 50))),
    "group": ({"images": ["a.png", "b.png"], "text": "A"}, Row(2, None, ("a.png", "b.png"), ("A",))),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_good_row_is_read(root: Path, case: str) -> None:
    content, row = GOOD[case]
    assert read_rows(write_list(root, [content]), root, thorough=True) == [row]


BROKEN = {
    "no object": ([1], "it is a list that holds a number; wanted an object with target, image_file and text"),
    "no target": (without("target"), 'no "target"; it has image_file, text'),
    "no references": (without("image_file"), 'no "image_file"; it has target, text'),
    "no text": (without("text"), 'no "text"; it has image_file, target'),
    "empty": ({}, 'no "target"; it has nothing'),
    "target of a wrong type": (
        pair(target=["a.png"]),
        '"target" is a list that holds a text; wanted the name of a file',
    ),
    "references of a wrong type": (
        pair(image_file=7),
        '"image_file" is a number; wanted the name of a file, or a list of names',
    ),
    "a reference of a wrong type": (
        pair(image_file=["b.png", None]),
        '"image_file" is a list that holds a text and null; wanted the name of a file, or a list of names',
    ),
    "text of a wrong type": (
        pair(text={"en": "A"}),
        '"text" is an object; wanted a text, or a list of texts',
    ),
    "empty references": (pair(image_file=[]), '"image_file" is empty; wanted at least one file'),
    "empty name": (pair(image_file=["b.png", ""]), '"image_file" is empty; wanted at least one file'),
    "missing target": (pair(target="x.png"), "x.png does not exist under {root}"),
    "missing reference": (pair(image_file=["b.png", "x.png"]), "x.png does not exist under {root}"),
    "folder": (pair(image_file="sub"), "sub does not exist under {root}"),
    "outside": (pair(target="../outside.png"), "../outside.png lies outside the root {root}"),
    "leak": (
        pair(image_file=["b.png", "./a.png"]),
        "the target a.png is among its own 2 references: take it out of image_file",
    ),
    "no faces": (face(), '"face" is empty; wanted at least one box [x1, y1, x2, y2]'),
    "half a face": (face([1, 2]), '"face" holds [1, 2]; wanted boxes [x1, y1, x2, y2] in pixels'),
    "a bare box": (
        face() | {"face": [1, 2, 30, 40]},
        '"face" holds 1; wanted boxes [x1, y1, x2, y2] in pixels',
    ),
    "face of words": (face(["a", 1, 2, 3]), '"face" holds ["a", 1, 2, 3]; wanted boxes'),
    "face upside down": (
        face([40, 10, 10, 50]),
        "the face box [40, 10, 10, 50] is -30x40 pixels; wanted x1 < x2, y1 < y2 and at least 14 pixels a side",
    ),
    "face in fractions": (
        face([0.1, 0.1, 0.4, 0.5]),
        "the face box [0.1, 0.1, 0.4, 0.5] is 0.3x0.4 pixels; wanted",
    ),
    "face outside": (
        face([90, 10, 130, 50]),
        "the face box [90, 10, 130, 50] lies outside its picture of 100x80 pixels",
    ),
    "face in no picture": (
        face([10, 10, 40, 50]) | {"target": "text.png"},
        "text.png cannot be read as a picture",
    ),
    "a group of one": (
        {"images": ["a.png"], "text": ""},
        '"images" lists 1 picture; wanted at least 2, one of them is held out as target',
    ),
    "a group with one twice": (
        {"images": ["a.png", "b.png", "./a.png"], "text": ""},
        '"images" lists a.png 2 times: held out, it would be among its own references',
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named_by_line_and_reason(root: Path, case: str) -> None:
    content, reason = BROKEN[case]
    path = write_list(root, [pair(), content])
    with pytest.raises(ValueError, match="rows") as error:
        read_rows(path, root)
    text = str(error.value)
    assert text.startswith(f"1 of 2 rows of {path} cannot be used; 0 may be skipped:\n")
    assert f"\n  line 3: {reason.format(root=root)}" in text
    assert text.endswith("\nMend or remove them, or set skip_rows to 1 to train without them.")


@pytest.mark.parametrize("name", ["text.png", "short.png"])
def test_what_is_no_picture_is_found_by_a_thorough_check(root: Path, name: str) -> None:
    path = write_list(root, [pair(image_file=name)])
    assert len(read_rows(path, root)) == 1
    with pytest.raises(ValueError, match=f"line 2: {name} cannot be read as a picture"):
        read_rows(path, root, thorough=True)


def test_a_row_is_named_by_the_line_it_starts_on(root: Path) -> None:
    path = root.parent / "rows.json"
    path.write_text(json.dumps([pair(), pair(), pair(target="x.png")], indent=2))  # 5 lines a row
    with pytest.raises(ValueError, match="line 12: x.png does not exist"):
        read_rows(path, root)


def test_json_lines_are_read_and_blank_lines_are_none(root: Path) -> None:
    path = write_lines(root, f"{json.dumps(pair())}\n\n{json.dumps(pair())}\n")
    assert [row.line for row in read_rows(path, root)] == [1, 3]


def test_a_broken_line_of_json_lines_is_a_broken_row(root: Path) -> None:
    path = write_lines(root, f'{json.dumps(pair())}\n{{"target":\n')
    with pytest.raises(ValueError, match=r"line 2: not JSON \(Expecting value at column"):
        read_rows(path, root)
    assert len(read_rows(path, root, skip_rows=1)) == 1


def test_a_byte_order_mark_does_no_harm(root: Path) -> None:
    path = root.parent / "rows.json"
    path.write_text(json.dumps([pair()]), encoding="utf-8-sig")
    assert len(read_rows(path, root)) == 1


@pytest.mark.parametrize(
    ("tail", "where"),
    [
        ("{}, ]", "Expecting value at line 2, column 5"),
        ("{} {}]", "Expecting ',' or ']' at line 2, column 4"),
        ("{}", "Expecting ',' or ']' at line 2, column 3"),
        ('{"a": }]', "Expecting value at line 2, column 7"),
    ],
)
def test_a_syntax_error_in_a_list_is_named_by_its_place(root: Path, tail: str, where: str) -> None:
    path = write_lines(root, f"[\n{tail}")
    with pytest.raises(ValueError, match="is no JSON list") as error:
        read_rows(path, root, skip_rows=10)
    assert f"{path} is no JSON list: {where}. Mend it there, or write one row a line" in str(error.value)


def test_as_many_rows_as_allowed_are_skipped_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_list(root, [pair(target="x.png"), pair(), pair(target="y.png")])
    with caplog.at_level(logging.WARNING):
        assert [row.line for row in read_rows(path, root, skip_rows=2)] == [3]
    assert "2 of 3 rows" in caplog.text
    assert "line 4: y.png does not exist" in caplog.text
    with pytest.raises(ValueError, match="set skip_rows to 2"):
        read_rows(path, root, skip_rows=1)


def test_only_the_first_broken_rows_are_listed(root: Path) -> None:
    path = write_list(root, [pair(target="x.png")] * 13)
    with pytest.raises(ValueError, match="13 of 13 rows") as error:
        read_rows(path, root)
    assert str(error.value).count("line ") == 10
    assert "\n  and 3 more.\n" in str(error.value)


@pytest.mark.parametrize(("rows", "found"), [([], "0 rows, 0"), ([pair(target="x.png")], "1 rows, 1")])
def test_a_run_needs_a_row(root: Path, rows: list[Any], found: str) -> None:
    path = write_list(root, rows)
    with pytest.raises(ValueError, match=rf"holds no row to train on \({found} of them broken\)"):
        read_rows(path, root, skip_rows=5)


def test_a_missing_file_and_a_missing_root_are_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="The rows' file .*x.json does not exist"):
        read_rows(root / "x.json", root)
    with pytest.raises(FileNotFoundError, match="The pictures' folder .*nowhere does not exist"):
        read_rows(write_list(root, []), root / "nowhere")
