"""Makes the workflow files of tools/workflow_plans.py in the real frontend, and a thumbnail of each.

    python tools/workflows.py [name ...]

The nodes are created, joined and laid out by the frontend itself, so that a file is what a user would have saved. Run it
again when a node gained an input.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import ImageOps
from screenshots import LANCZOS, THUMBNAIL, WORKFLOWS, shot

from devkit.host import browser
from devkit.host.server import ComfyServer
from devkit.hosts import find_hosts
from devkit.project import pyproject
from tools.workflow_plans import EASYREF, PLANS, SDXL, Link, Plan

if TYPE_CHECKING:
    from playwright.sync_api import Page

VIEW = (2300, 1150)  # pixels
GAP = (60, 70)  # pixels between columns and between the nodes of a column, title bars included
WIDTH = {
    "LoadImage": 280,
    "SaveImage": 420,
    "PreviewImage": 420,
    "CLIPTextEncode": 380,
    "EasyRefEncodeGroup": 400,
    "EasyRefReferenceAttention": 420,
    "EasyRefReferenceInfluence": 420,
    "EasyRefWhereItActs": 420,
}
USUAL = 300
CANVAS = (20, 20, 20)  # the frontend's background
NOTE = 440  # pixels, width of the note
VERSION = pyproject()["project"]["version"]
FILES = (
    f"checkpoints/{SDXL[0]}",
    f"easyref/{EASYREF[0]}",
    "controlnet/controlnet.safetensors",
    "loras/lora.safetensors",
)
HOST = "0.20.0"  # the oldest ComfyUI that a workflow asks for

BUILD = """async ([note, noteWidth, nodes, gap]) => {
    app.graph.clear()
    const made = {}
    for (const [name, plan] of Object.entries(nodes)) {
        const node = LiteGraph.createNode(plan.type)
        if (!node) throw new Error(`no node ${plan.type}`)
        if (plan.title) node.title = plan.title
        app.graph.add(node)
        made[name] = node
        for (const [input, value] of Object.entries(plan.values)) {
            const widget = node.widgets?.find(widget => widget.name === input)
            if (!widget) throw new Error(`${plan.type} has no widget ${input}: ${node.widgets?.map(w => w.name)}`)
            widget.value = value
            widget.callback?.(value)
        }
        // the frontend randomizes seeds, and every Run would execute their nodes again
        for (const control of (node.widgets ?? []).flatMap(widget => widget.linkedWidgets ?? [])) control.value = 'fixed'
    }
    for (const [name, plan] of Object.entries(nodes))
        for (const [input, [from, output]] of Object.entries(plan.links)) {
            const slot = made[name].findInputSlot(input)
            if (slot < 0) throw new Error(`${plan.type} has no input ${input}: ${made[name].inputs.map(i => i.name)}`)
            if (!made[from].connect(output, made[name], slot)) throw new Error(`${from} does not fit ${name}.${input}`)
        }
    await new Promise(done => setTimeout(done, 300))
    const columns = []
    for (const [name, plan] of Object.entries(nodes)) (columns[plan.column] ??= []).push(name)
    let x = noteWidth + gap[0]
    for (const names of columns.filter(Boolean)) {
        let y = 0, wide = 0
        for (const name of names) {
            const [least, height] = made[name].computeSize()
            made[name].setSize([Math.max(nodes[name].width, least), Math.max(nodes[name].height, height)])
            made[name].pos = [x, y]
            y += made[name].size[1] + gap[1]
            wide = Math.max(wide, made[name].size[0])
        }
        x += wide + gap[0]
    }
    const text = LiteGraph.createNode('MarkdownNote')
    text.title = 'How to use'
    app.graph.add(text)
    text.widgets[0].value = note
    text.pos = [0, 0]
    text.setSize([noteWidth, 620])
    text.color = '#432'
    text.bgcolor = '#653'
    await new Promise(done => setTimeout(done, 300))
    const saved = app.graph.serialize()
    return [saved, Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]))]
}"""


def main() -> None:
    names = sys.argv[1:] or list(PLANS)
    with ComfyServer(find_hosts()[0]) as server:
        shutil.copy(server.host / "input" / "example.png", server.base / "input")
        for file in FILES:  # the frontend marks loaders whose file is missing
            place = server.base / "models" / file
            place.parent.mkdir(exist_ok=True)
            place.touch()
        server.post("/api/settings", {"Comfy.Minimap.Visible": False})
        for name in names:
            # a page for each: the frontend keeps values by a node's number and a widget's name, beyond the node itself
            with browser.frontend(server, *VIEW) as page:
                file = WORKFLOWS / f"{name}.json"
                saved = build(page, PLANS[name])
                file.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                picture(page, file, saved)
                print(f"workflows: {name}, {len(saved['nodes'])} nodes", flush=True)


def build(page: Page, plan: Plan) -> dict[str, Any]:
    """The workflow as the frontend saves it, with where its nodes and models come from."""
    nodes = {
        name: dataclasses.asdict(node)
        | {
            "values": {k: v for k, v in node.inputs.items() if not isinstance(v, Link)},
            "links": {k: list(v) for k, v in node.inputs.items() if isinstance(v, Link)},
            "width": WIDTH.get(node.type, USUAL),
        }
        for name, node in plan.nodes.items()
    }
    saved, ids = page.evaluate(BUILD, [plan.note, NOTE, nodes, GAP])
    models = {str(ids[name]): node.model for name, node in plan.nodes.items()}
    for node in saved["nodes"]:
        ours = node["type"].startswith("EasyRef")
        node["properties"] = {"Node name for S&R": node["type"]}
        if node["type"] != "MarkdownNote":
            node["properties"] |= (
                {"cnr_id": "easyref", "ver": VERSION} if ours else {"cnr_id": "comfy-core", "ver": HOST}
            )
        if model := models.get(str(node["id"])):
            file, url, folder = model
            node["properties"]["models"] = [{"name": file, "url": url, "directory": folder}]
    saved = without_nothing(saved)
    saved["id"] = "00000000-0000-0000-0000-000000000000"
    saved["extra"] = {"ds": {"scale": 0.7, "offset": [60, 150]}}
    return saved


def without_nothing(saved: Any) -> Any:
    """The same without the properties that hold nothing, but for the links of unconnected inputs."""
    if isinstance(saved, dict):
        return {k: without_nothing(v) for k, v in saved.items() if v is not None or k == "link"}
    return [without_nothing(v) for v in saved] if isinstance(saved, list) else saved


def picture(page: Page, file: Path, saved: dict[str, Any]) -> None:
    """The thumbnail: the whole workflow as it opens."""
    browser.open_workflow(page, file)
    right = max(node["pos"][0] + node["size"][0] for node in saved["nodes"])
    bottom = max(node["pos"][1] + node["size"][1] for node in saved["nodes"])
    scale = min((VIEW[0] - 120) / right, (VIEW[1] - 190) / (bottom + 40))
    opened = shot(page, (80 / scale, 150 / scale, scale), 1000)
    shown = opened.crop((60, 110, 60 + int(right * scale) + 40, 130 + int((bottom + 40) * scale)))
    ImageOps.pad(shown, THUMBNAIL, LANCZOS, CANVAS).save(file.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
