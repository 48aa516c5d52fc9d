"""The layout of the shipped workflows, from the positions and sizes that they are saved with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from devkit.hosts import ROOT
from tools.workflow_layout import GAP, Box, Cell, box_of, overlaps, place, title_of, wires_behind_nodes

FILES = sorted((ROOT / "workflows").glob("*.json"))
MAX_HIDDEN = 3  # wires of a workflow that pass behind a node
AFTER_GENERATE = {"fixed", "increment", "decrement", "randomize"}


def node(number: int, x: float, y: float, title: str = "", **fields: Any) -> dict[str, Any]:
    return {"id": number, "pos": [x, y], "size": [100, 100], "title": title, "inputs": [{}], **fields}


def test_nodes_of_a_cell_are_below_each_other_and_rows_begin_at_one_height() -> None:
    cells = {
        "image": Cell(0, None, 100, 5000),
        "a": Cell(1, 0, 100, 80, above=50),
        "b": Cell(1, 0, 200, 80),
        "c": Cell(2, 3, 100, 80),
        "d": Cell(5, 0, 100, 300),
    }
    places = place(cells, 40)
    assert places["image"] == (40, 0, 100, 5000)
    assert places["a"] == (140 + 64, 50, 200, 80)  # as wide as its column
    assert places["b"] == (140 + 64, 50 + 80 + 30 + GAP[1], 200, 80)
    # below the tallest cell of the row above; the column without rows takes no part in it
    assert places["c"] == (204 + 200 + 64, 300 + 30 + 80, 100, 80)
    boxes = [node(i, x, y, size=[*size]) for i, (x, y, *size) in enumerate(places.values())]
    assert overlaps(boxes) == []


def test_overlap_counts_the_title_bar() -> None:
    assert overlaps([node(1, 0, 0, "a"), node(2, 50, 129, "b")]) == [("a", "b")]
    assert overlaps([node(1, 0, 0, "a"), node(2, 50, 130, "b")]) == []


@pytest.mark.parametrize(("y", "hidden"), [(0, ["a -> c behind b"]), (200, []), (-200, [])])
def test_wire_is_behind_a_node_in_its_way(y: float, hidden: list[str]) -> None:
    nodes = [node(1, 0, 0, "a"), node(2, 200, y, "b"), node(3, 400, 0, "c")]
    assert wires_behind_nodes({"nodes": nodes, "links": [[1, 1, 0, 3, 0, "MODEL"]]}) == hidden


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def saved(request: pytest.FixtureRequest) -> dict[str, Any]:
    file: Path = request.param
    return json.loads(file.read_text(encoding="utf-8"))


def test_no_node_overlaps_another(saved) -> None:
    assert overlaps(saved["nodes"]) == []


def test_few_wires_are_hidden(saved) -> None:
    assert len(wires_behind_nodes(saved)) <= MAX_HIDDEN, wires_behind_nodes(saved)


def test_titles_are_unique(saved) -> None:
    titles = Counter(map(title_of, saved["nodes"]))
    assert {title: count for title, count in titles.items() if count > 1} == {}


def test_every_node_is_in_one_group_with_a_title(saved) -> None:
    groups = {
        group["title"]: Box(x, y, x + width, y + height)
        for group in saved["groups"]
        for x, y, width, height in [group["bounding"]]
    }
    assert len(groups) == len(saved["groups"])
    assert "" not in groups
    for one in saved["nodes"]:
        around = [title for title, box in groups.items() if box.overlaps(box_of(one))]
        assert len(around) == (one["type"] != "MarkdownNote"), (title_of(one), around)


def test_notes_have_the_colours_of_the_hosts_notes(saved) -> None:
    notes = [one for one in saved["nodes"] if one["type"] == "MarkdownNote"]
    assert {(note["color"], note["bgcolor"]) for note in notes} == {("#222", "#000")}


def test_every_widget_has_a_value(saved) -> None:
    for one in saved["nodes"]:
        values = [value for value in one.get("widgets_values", []) if value not in AFTER_GENERATE]
        widgets = [slot["name"] for slot in one["inputs"] if "widget" in slot]
        if one["type"] != "MarkdownNote":
            assert len(values) == len(widgets), title_of(one)
        assert None not in values
