"""Layout of workflows: places nodes in columns and rows, frames groups, and finds overlaps and hidden wires.

It works on the numbers of a saved workflow, so a test can check a file without a frontend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

TITLE_BAR = 30  # pixels, above a node's position; both renderers draw it there
# pixels between columns, and between the nodes of one cell: Vue draws a bar of 24 pixels below a node with an
# error, such as a loader whose file is missing
GAP = (64, 32)
ROW_GAP = 80  # pixels between rows, with room for the title of a group
MARGIN, GROUP_TITLE = 20, 50  # pixels from a group's frame to its nodes, at the top with its title
SLOT, WIDGET = 20, 24  # pixels, height of a slot and of a widget
SAMPLES = 64  # points along a wire


class Box(NamedTuple):
    """A rectangle of the canvas."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def contains(self, x: float, y: float) -> bool:
        return self.left < x < self.right and self.top < y < self.bottom


class Cell(NamedTuple):
    """The place of one node in a table, and its size in pixels without its title bar.

    row: None is a column of its own, whose nodes take no part in the height of the rows.
    above: pixels left free above the node, for wires that pass there.
    """

    column: int
    row: int | None
    width: float
    height: float
    above: float = 0


def place(cells: Mapping[str, Cell], left: float) -> dict[str, tuple[float, float, float, float]]:
    """Position and size of nodes by name, from `left` on.

    Nodes of one cell are below each other, in their order. Each is as wide as its column, so that wires leave
    at one edge.
    """
    widths: dict[int, float] = {}
    heights: dict[tuple[int, int | None], float] = {}
    for cell in cells.values():
        widths[cell.column] = max(widths.get(cell.column, 0), cell.width)
        key = cell.column, cell.row
        heights[key] = heights.get(key, -GAP[1]) + cell.above + cell.height + TITLE_BAR + GAP[1]
    x = dict(zip(sorted(widths), _starts([widths[key] for key in sorted(widths)], left, GAP[0]), strict=True))
    rows = sorted({row for _, row in heights if row is not None})
    tallest = [max(height for (_, row), height in heights.items() if row == number) for number in rows]
    y = dict(zip(rows, _starts(tallest, 0, ROW_GAP), strict=True)) | {None: 0.0}
    places, filled = {}, dict.fromkeys(heights, 0.0)
    for name, cell in cells.items():
        key = cell.column, cell.row
        filled[key] += cell.above
        places[name] = x[cell.column], y[cell.row] + filled[key], widths[cell.column], cell.height
        filled[key] += cell.height + TITLE_BAR + GAP[1]
    return places


def _starts(sizes: Sequence[float], first: float, gap: float) -> Iterator[float]:
    for size in sizes:
        yield first
        first += size + gap


def box_of(node: Mapping[str, Any]) -> Box:
    """The rectangle of a saved node, with its title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return Box(x, y - TITLE_BAR, x + width, y + height)


def frame(nodes: Sequence[Mapping[str, Any]]) -> Box:
    """The rectangle of a group around saved nodes."""
    boxes = [box_of(node) for node in nodes]
    return Box(
        min(box.left for box in boxes) - MARGIN,
        min(box.top for box in boxes) - GROUP_TITLE,
        max(box.right for box in boxes) + MARGIN,
        max(box.bottom for box in boxes) + MARGIN,
    )


def extent(saved: Mapping[str, Any]) -> Box:
    """The rectangle around all nodes and groups of a saved workflow."""
    boxes = [box_of(node) for node in saved["nodes"]]
    boxes += [
        Box(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in saved["groups"])
    ]
    return Box(
        min(box.left for box in boxes),
        min(box.top for box in boxes),
        max(box.right for box in boxes),
        max(box.bottom for box in boxes),
    )


def title_of(node: Mapping[str, Any]) -> str:
    """The title of a saved node, or the type that it is titled by."""
    return node["title"] if "title" in node else node["type"]


def overlaps(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The titles of the pairs of saved nodes that overlap."""
    boxes = [(title_of(node), box_of(node)) for node in nodes]
    return [
        (one, other)
        for i, (one, box) in enumerate(boxes)
        for other, second in boxes[i + 1 :]
        if box.overlaps(second)
    ]


def wires_behind_nodes(saved: Mapping[str, Any]) -> list[str]:
    """Each wire of a saved workflow that passes behind a node which it does not end at."""
    nodes = {node["id"]: node for node in saved["nodes"]}
    behind = []
    for _, source, output, target, slot, _ in saved["links"]:
        start, end = output_point(nodes[source], output), input_point(nodes[target], slot)
        hidden = [
            title_of(node)
            for number, node in nodes.items()
            if number not in (source, target)
            and any(box_of(node).contains(*point) for point in wire(start, end))
        ]
        if hidden:
            ends = f"{title_of(nodes[source])} -> {title_of(nodes[target])}"
            behind.append(f"{ends} behind {', '.join(hidden)}")
    return behind


def output_point(node: Mapping[str, Any], slot: int) -> tuple[float, float]:
    return node["pos"][0] + node["size"][0] - SLOT / 2, node["pos"][1] + (slot + 0.7) * SLOT


def input_point(node: Mapping[str, Any], slot: int) -> tuple[float, float]:
    """The end of a wire at an input: sockets come first, then the inputs that are widgets."""
    sockets = [i for i, one in enumerate(node["inputs"]) if "widget" not in one]
    x, y = node["pos"][0] + SLOT / 2, node["pos"][1]
    if slot in sockets:
        return x, y + (sockets.index(slot) + 0.7) * SLOT
    widgets = [i for i, one in enumerate(node["inputs"]) if "widget" in one]
    rows = max(len(sockets), len(node.get("outputs", [])))
    return x, y + rows * SLOT + (widgets.index(slot) + 0.5) * WIDGET


def wire(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of a wire, a cubic spline that leaves and arrives horizontally, as the canvas draws it."""
    reach = math.dist(start, end) / 4
    controls = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    points = []
    for i in range(SAMPLES + 1):
        t = i / SAMPLES
        factors = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        points.append(
            tuple(sum(f * p[axis] for f, p in zip(factors, controls, strict=True)) for axis in (0, 1))
        )
    return points
