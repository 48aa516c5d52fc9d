"""Build the blueprints and workflows of tools/workflow_plans.yaml in the real frontend.

    python tools/workflows.py [name ...]

The frontend itself creates and links the nodes, so a file is the same as one that a user saves. Their sizes
are measured in both renderers, and workflow_layout.py places them. Run it again when a node gains an input.
"""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.host import browser
from devkit.host.server import ComfyServer
from devkit.hosts import ROOT, find_hosts
from devkit.project import pyproject
from tools.workflow_layout import GAP, Cell, extent, frame, place
from tools.workflow_plans import BLUEPRINTS, PLANS, App, Node, Plan

if TYPE_CHECKING:
    from playwright.sync_api import Page

SUBGRAPHS, WORKFLOWS = ROOT / "subgraphs", ROOT / "workflows"
CATEGORY = "EasyRef"  # of the blueprints, in the frontend's list
VIEW = (1280, 720)  # pixels
WIDTH = {
    "LoadImage": 240,
    "SaveImage": 400,
    "PreviewImage": 360,
    "CLIPTextEncode": 320,
    "EasyRefEncodeGroup": 320,
    "EasyRefReferenceAttention": 400,
    "EasyRefReferenceInfluence": 400,
    "EasyRefWhereItActs": 400,
    "EasyRefSheet": 480,
}
USUAL, BLUEPRINT = 280, 460
BLUE = "#3f789e"  # of a group's frame, the frontend's own
NOTE_WIDTH = 340  # pixels
SCREEN, BARS, MIN_SCALE = (1440, 900), (70, 90), 0.58  # pixels; below this scale LiteGraph draws no text
VERSION = pyproject()["project"]["version"]
FILES = (
    "checkpoints/sd_xl_base_1.0.safetensors",
    "easyref/easyref.safetensors",
    "controlnet/controlnet.safetensors",
    "loras/lora.safetensors",
)
HOST = "0.20.0"  # the oldest ComfyUI that a workflow asks for


def main() -> None:
    names = sys.argv[1:] or [*BLUEPRINTS, *PLANS]
    with ComfyServer(find_hosts()[0]) as server:
        shutil.copy(server.host / "input" / "example.png", server.base / "input")
        for file in FILES:  # the frontend marks loaders whose file is missing
            path = server.base / "models" / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
        with browser.frontend(server, *VIEW) as page:
            for name in names:
                file = SUBGRAPHS / f"{name}.json" if name in BLUEPRINTS else WORKFLOWS / f"{name}.json"
                saved = build_blueprint(page, name) if name in BLUEPRINTS else build(page, PLANS[name])
                file.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(f"workflows: {name}, {len(saved['nodes'])} nodes", flush=True)
                # the frontend keeps values and images by node number
                browser.reload(page)


def build(page: Page, plan: Plan) -> dict[str, Any]:
    """The workflow as the frontend saves it, with where its nodes and models come from."""
    ids = add_nodes(page, plan.nodes)
    note = browser.run_script(page, "add_note", [plan.note, NOTE_WIDTH])
    sizes = smallest_sizes(page)
    lay_out(page, plan.nodes, ids, sizes, NOTE_WIDTH + GAP[0])
    browser.run_script(page, "place", [[note, 0, 0, *sizes[str(note)]]])
    saved = serialized(page)
    set_properties(saved["nodes"], plan.nodes, ids)
    saved["groups"] = groups_of(saved["nodes"], plan.nodes, ids)
    saved["extra"] = {"ds": view(saved)}
    if plan.app:
        make_app(saved, plan.app, ids)
    return saved


def groups_of(
    saved: Sequence[dict[str, Any]], planned: Mapping[str, Node], ids: Mapping[str, int | str]
) -> list[dict[str, Any]]:
    """The frames around the nodes that name them."""
    nodes = {str(node["id"]): node for node in saved}
    members: dict[str, list[dict[str, Any]]] = {}
    for name, node in planned.items():
        if node.group:
            members.setdefault(node.group, []).append(nodes[str(ids[name])])
    groups = []
    for number, (title, inside) in enumerate(members.items(), start=1):
        box = frame(inside)
        bounding = [box.left, box.top, box.right - box.left, box.bottom - box.top]
        groups.append({"id": number, "title": title, "bounding": bounding, "color": BLUE, "flags": {}})
    return groups


def view(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Scale and offset of the canvas at which a workflow fills a usual screen, beside the frontend's bars."""
    left, top, right, bottom = extent(saved)
    fits = [(SCREEN[0] - BARS[0]) / (right - left), (SCREEN[1] - BARS[1]) / (bottom - top)]
    scale = round(max(MIN_SCALE, min(1, *fits)), 3)
    return {"scale": scale, "offset": [round(BARS[0] / scale - left), round(BARS[1] / scale - top)]}


def make_app(saved: dict[str, Any], app: App, ids: Mapping[str, int | str]) -> None:
    """Let a workflow open as an app."""
    nodes = {str(node["id"]): node for node in saved["nodes"]}
    for name, widget, label in app.inputs:
        (slot,) = (slot for slot in nodes[str(ids[name])]["inputs"] if slot["name"] == widget)
        slot["label"] = label
    inputs = [[str(ids[name]), widget] for name, widget, _ in app.inputs]
    outputs = [str(ids[name]) for name in app.outputs]
    saved["extra"] |= {"linearMode": True, "linearData": {"inputs": inputs, "outputs": outputs}}


def build_blueprint(page: Page, name: str) -> dict[str, Any]:
    """The blueprint as the frontend saves it: a workflow of one node, and its subgraph."""
    plan = BLUEPRINTS[name]
    ids = add_nodes(page, plan.nodes)
    lay_out(page, plan.nodes, ids, smallest_sizes(page))
    browser.run_script(page, "make_subgraph", [name, ids, plan.inputs, plan.outputs])
    saved = serialized(page)
    (subgraph,) = saved["definitions"]["subgraphs"]
    subgraph |= {"category": CATEGORY, "description": plan.description, "extra": {}}
    set_properties(subgraph["nodes"], plan.nodes, ids)
    saved["extra"] = {
        "BlueprintDescription": plan.description,
        "BlueprintSearchAliases": list(plan.search_aliases),
    }
    return saved


def add_nodes(page: Page, planned: Mapping[str, Node]) -> dict[str, int | str]:
    """Create and link nodes in an empty graph. Return their ids by name."""
    nodes = {
        name: {
            "type": node.type,
            "title": node.title,
            "blueprint": read_blueprint(node.type) if node.type in BLUEPRINTS else None,
            "values": {k: v for k, v in node.inputs.items() if not isinstance(v, list)},
            "links": {k: v for k, v in node.inputs.items() if isinstance(v, list)},
        }
        for name, node in planned.items()
    }
    return browser.run_script(page, "add_nodes", [nodes])


def lay_out(
    page: Page,
    planned: Mapping[str, Node],
    ids: Mapping[str, int | str],
    smallest: Mapping[str, tuple[int, int]],
    left: int = 0,
) -> None:
    """Place nodes of these least sizes from `left` on."""
    cells = {}
    for name, node in sorted(planned.items(), key=lambda item: item[1].order):
        width, height = smallest[str(ids[name])]
        least = BLUEPRINT if node.type in BLUEPRINTS else WIDTH.get(node.type, USUAL)
        cells[name] = Cell(node.column, node.row, max(least, width), max(node.height, height), node.above)
    places = [[ids[name], *box] for name, box in place(cells, left).items()]
    browser.run_script(page, "place", places)
    page.wait_for_timeout(300)


def smallest_sizes(page: Page) -> dict[str, tuple[int, int]]:
    """The least width and height of each node, by its id, that suffice in both renderers."""
    largest: dict[str, tuple[int, int]] = {}
    for renderer in ("Vue", "LiteGraph"):
        browser.set_renderer(page, renderer)
        for number, size in browser.run_script(page, "smallest_sizes").items():
            known = largest.get(number, (0, 0))
            largest[number] = max(known[0], round(size[0])), max(known[1], round(size[1]))
    return largest


def read_blueprint(name: str) -> dict[str, Any]:
    return json.loads((SUBGRAPHS / f"{name}.json").read_text(encoding="utf-8"))


def serialized(page: Page) -> dict[str, Any]:
    """The graph as the frontend saves it, without null properties and random ids."""
    saved = drop_nulls(page.evaluate("() => app.graph.serialize()"))
    saved["id"] = "00000000-0000-0000-0000-000000000000"
    text = json.dumps(saved)
    for subgraph in saved.get("definitions", {}).get("subgraphs", []):
        name = subgraph["name"]
        random = {subgraph["id"]: name}
        random |= {slot["id"]: f"{name} in {slot['name']}" for slot in subgraph["inputs"]}
        random |= {slot["id"]: f"{name} out {slot['name']}" for slot in subgraph["outputs"]}
        for old, stable in random.items():
            text = text.replace(old, str(uuid.uuid5(uuid.NAMESPACE_URL, f"easyref {stable}")))
    return json.loads(text)


def set_properties(
    saved: Sequence[dict[str, Any]], planned: Mapping[str, Node], ids: Mapping[str, int | str]
) -> None:
    """Set where nodes come from, and the models that they load."""
    plans = {str(ids[name]): node for name, node in planned.items()}
    for node in saved:
        node["properties"] = {"Node name for S&R": node["type"]}
        if node["type"] == "MarkdownNote":
            continue
        plan = plans[str(node["id"])]
        ours = plan.type.startswith("EasyRef")
        node["properties"] |= (
            {"cnr_id": "easyref", "ver": VERSION} if ours else {"cnr_id": "comfy-core", "ver": HOST}
        )
        if plan.model:
            file, url, folder = plan.model
            node["properties"]["models"] = [{"name": file, "url": url, "directory": folder}]


def drop_nulls(saved: Any) -> Any:
    """The same without null properties, except the links of unconnected inputs."""
    if isinstance(saved, dict):
        return {k: drop_nulls(v) for k, v in saved.items() if v is not None or k == "link"}
    return [drop_nulls(v) for v in saved] if isinstance(saved, list) else saved


if __name__ == "__main__":
    main()
