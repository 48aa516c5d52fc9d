"""Renew the thumbnails of the template browser, and the results that help pages show.

    python tools/thumbnails.py [name ...]

A thumbnail has the references of a workflow and the images of a run, on the tiny demo model, which takes
seconds; a workflow for SDXL gets the thumbnail of its tiny variant, or of another tiny workflow that shows
the same. One whose point the tiny model cannot show (LoRA, ControlNet) is drawn as a diagram of its nodes.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw

from devkit import pictures
from devkit.host import graphs
from devkit.host.server import ComfyServer
from devkit.hosts import ROOT, find_hosts
from tools.workflow_layout import box_of, input_point, output_point, wire
from tools.workflow_plans import PLANS, VARIANTS, Fields

WORKFLOWS = ROOT / "workflows"
SIZE = (800, 450)  # pixels
PAPER, INK = (24, 24, 28), (150, 150, 160)
EDGE, SPACE = 30, 12  # pixels around, and between two images
LEFT = 260  # pixels, width of the references
SAMPLES = 3  # along a side of a pixel of a diagram
FRAME, NODE, OURS = (38, 44, 58), (58, 58, 66), (52, 88, 124)
WIRES = {
    "IMAGE": (92, 176, 255),
    "MODEL": (180, 150, 230),
    "CONDITIONING": (240, 170, 70),
    "LATENT": (240, 120, 190),
    "VAE": (230, 90, 90),
    "CLIP": (240, 210, 80),
}
REFERENCES = 4  # output of Tiny Demo Model
SHOWN_BESIDE = ("References", "Without EasyRef", "Before")  # titles of images that are not the result
HELP_SIZE = (640, 800)  # pixels, at most
# workflows without a tiny variant whose point another one shows: its name, and inputs by node type
INSTEAD: dict[str, tuple[str, dict[str, Fields]]] = {
    "one_node": ("try_it_now", {"EasyRefDemo": {"example": 8, "references": 3}}),
    "identity_portrait": (
        "style_from_a_group_tiny",
        {
            "EasyRefDemo": {"example": 104, "prompt": "a thing on grass at the left"},
            "EasyRefInstruction": {"preset": "identity"},
        },
    ),
}
RESULTS = (
    "PreviewImage",
    "EasyRefSheet",
    "EasyRefReferenceAttention",
    "EasyRefReferenceInfluence",
    "EasyRefWhereItActs",
)


def main() -> None:
    chosen = sys.argv[1:] or list(PLANS)
    tiny = {VARIANTS.get(name, name) for name in chosen}
    runs = sorted(name for name in tiny if PLANS[name].is_tiny)
    with ComfyServer(find_hosts()[0]) as server:
        for name in runs:
            thumbnail, results = run(server, name, {})
            save(thumbnail, [name, *(one for one, variant in VARIANTS.items() if variant == name)])
            save_help(name, thumbnail, results)
        for name in sorted(tiny & INSTEAD.keys()):
            save(run(server, *INSTEAD[name])[0], [name])
    for name in sorted(tiny - set(runs) - INSTEAD.keys()):
        save(diagram(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))), [name])


def save(thumbnail: Image.Image, names: Sequence[str]) -> None:
    files = [WORKFLOWS / f"{name}.jpg" for name in names]
    for file in files:
        thumbnail.save(file, quality=88)
    pictures.record(files)
    print(f"thumbnails: {', '.join(names)}", flush=True)


def save_help(name: str, thumbnail: Image.Image, results: Mapping[str, Sequence[Image.Image]]) -> None:
    """The results of a workflow's run that help pages show: a node's chart, or the thumbnail."""
    nodes = [node for node, workflow in pictures.RUNS.items() if workflow == name]
    for node in nodes:
        small = results[node][0].copy() if node in results else thumbnail.copy()
        small.thumbnail(HELP_SIZE, Image.Resampling.LANCZOS)
        small.convert("RGB").save(pictures.result_picture(node), quality=85)
    pictures.record(map(pictures.result_picture, nodes))


def run(
    server: ComfyServer, name: str, changes: Mapping[str, Fields]
) -> tuple[Image.Image, dict[str, list[Image.Image]]]:
    """Thumbnail, and images by node type, of a tiny workflow's run with inputs changed by node type."""
    graph = graphs.from_file(WORKFLOWS / f"{name}.json")
    for node in graph.values():
        node["inputs"] |= changes.get(node["class_type"], {})
    read = {
        tuple(value)
        for node in graph.values()
        for value in node["inputs"].values()
        if isinstance(value, list)
    }
    groups = [graph[number]["inputs"] for number in graph if (number, REFERENCES) in read]
    history = server.run(graph, timeout=600)
    results: dict[str, list[Image.Image]] = {}
    for number, node in history["prompt"][2].items():
        kind, output = node["class_type"], history["outputs"].get(number)
        if output and kind in RESULTS and node["_meta"]["title"] not in SHOWN_BESIDE:
            pngs = server.images({"outputs": {number: output}})
            results.setdefault(kind, []).extend(Image.open(io.BytesIO(png)) for png in pngs)
    return compose(references_of(groups), [image for images in results.values() for image in images]), results


def references_of(demos: Sequence[Fields]) -> list[Image.Image]:
    """The references of groups, by the inputs of the nodes that give them."""
    from easyref_core.tiny.demo_groups import DEMO_GROUPS

    images = []
    for inputs in demos:
        group = DEMO_GROUPS[inputs["world"]].demo_group(
            inputs["example"], inputs["references"], inputs["with_outsider"]
        )
        images += map(Image.fromarray, group.references)
    return images


def diagram(saved: Mapping[str, Any]) -> Image.Image:
    """The groups, nodes and wires of a saved workflow."""
    nodes = {node["id"]: node for node in saved["nodes"]}
    frames = [group["bounding"] for group in saved["groups"]]
    left, top = min(x for x, *_ in frames), min(y for _, y, *_ in frames)
    right, bottom = max(x + width for x, _, width, _ in frames), max(y + height for _, y, _, height in frames)
    scale = min((SIZE[0] - 2 * EDGE) / (right - left), (SIZE[1] - 2 * EDGE) / (bottom - top))
    x0 = (SIZE[0] - scale * (right - left)) / 2 - scale * left
    y0 = (SIZE[1] - scale * (bottom - top)) / 2 - scale * top
    large = [SIZE[0] * SAMPLES, SIZE[1] * SAMPLES]

    def at(x: float, y: float) -> tuple[float, float]:
        return SAMPLES * (x0 + scale * x), SAMPLES * (y0 + scale * y)

    canvas = Image.new("RGB", large, PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, y, width, height in frames:
        draw.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 6 * SAMPLES, FRAME)
    for _, source, output, target, slot, kind in saved["links"]:
        ends = output_point(nodes[source], output), input_point(nodes[target], slot)
        draw.line([at(*point) for point in wire(*ends)], WIRES.get(kind, INK), 2 * SAMPLES)
    for node in saved["nodes"]:
        if node["type"] != "MarkdownNote":
            box = box_of(node)
            ours = node["type"].startswith("EasyRef") or "-" in node["type"]
            fill = OURS if ours else NODE
            draw.rounded_rectangle((*at(*box[:2]), *at(*box[2:])), 3 * SAMPLES, fill, INK, SAMPLES)
    return canvas.resize(SIZE, Image.Resampling.BOX)


def compose(references: Sequence[Image.Image], results: Sequence[Image.Image]) -> Image.Image:
    """References at the left, an arrow, results at the right."""
    canvas = Image.new("RGB", SIZE, PAPER)
    height = SIZE[1] - 2 * EDGE
    arrow = EDGE + LEFT + EDGE
    tile(canvas, references, (EDGE, EDGE, LEFT, height))
    tip = [(arrow + 16, SIZE[1] // 2), (arrow, SIZE[1] // 2 - 14), (arrow, SIZE[1] // 2 + 14)]
    ImageDraw.Draw(canvas).polygon(tip, INK)
    left = arrow + 16 + EDGE
    tile(canvas, results, (left, EDGE, SIZE[0] - left - EDGE, height))
    return canvas


def tile(canvas: Image.Image, images: Sequence[Image.Image], area: tuple[int, int, int, int]) -> None:
    """Draw images as large as fit into an area (left, top, width, height), in rows, in its middle."""
    left, top, width, height = area
    best = max(range(1, len(images) + 1), key=lambda columns: min(_cell(area, columns, len(images))))
    rows = -(-len(images) // best)
    room = _cell(area, best, len(images))
    scales = [min(room[0] / image.width, room[1] / image.height) for image in images]
    shown = [
        image.convert("RGB").resize(
            (max(1, round(scale * image.width)), max(1, round(scale * image.height))),
            Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS,
        )
        for image, scale in zip(images, scales, strict=True)
    ]
    cell = max(image.width for image in shown), max(image.height for image in shown)
    x0 = left + (width - best * cell[0] - (best - 1) * SPACE) // 2
    y0 = top + (height - rows * cell[1] - (rows - 1) * SPACE) // 2
    for i, image in enumerate(shown):
        x = x0 + (i % best) * (cell[0] + SPACE) + (cell[0] - image.width) // 2
        y = y0 + (i // best) * (cell[1] + SPACE) + (cell[1] - image.height) // 2
        canvas.paste(image, (x, y))


def _cell(area: tuple[int, int, int, int], columns: int, count: int) -> tuple[int, int]:
    """Width and height of a cell if `count` images are in so many columns of an area."""
    rows = -(-count // columns)
    return (area[2] - (columns - 1) * SPACE) // columns, (area[3] - (rows - 1) * SPACE) // rows


if __name__ == "__main__":
    main()
