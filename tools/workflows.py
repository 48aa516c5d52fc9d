"""Build the workflow files of tools/workflow_plans.yaml in the real frontend, and a thumbnail of each.

    python tools/workflows.py [name ...]

The frontend itself creates, links and lays out the nodes, so a file is the same as one that a user saves. Run
it again when a node gains an input.
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
from screenshots import LANCZOS, THUMBNAIL, WORKFLOWS

from devkit.host import browser
from devkit.host.server import ComfyServer
from devkit.hosts import find_hosts
from devkit.project import pyproject
from tools.workflow_plans import PLANS, Plan

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
    "checkpoints/sd_xl_base_1.0.safetensors",
    "easyref/easyref.safetensors",
    "controlnet/controlnet.safetensors",
    "loras/lora.safetensors",
)
HOST = "0.20.0"  # the oldest ComfyUI that a workflow asks for


def main() -> None:
    names = sys.argv[1:] or list(PLANS)
    with ComfyServer(find_hosts()[0]) as server:
        shutil.copy(server.host / "input" / "example.png", server.base / "input")
        for file in FILES:  # the frontend marks loaders whose file is missing
            place = server.base / "models" / file
            place.parent.mkdir(exist_ok=True)
            place.touch()
        for name in names:
            # a page for each: the frontend keeps values by node number and widget name
            with browser.frontend(server, *VIEW) as page:
                file = WORKFLOWS / f"{name}.json"
                saved = build(page, PLANS[name])
                file.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                save_thumbnail(page, file, saved)
                print(f"workflows: {name}, {len(saved['nodes'])} nodes", flush=True)


def build(page: Page, plan: Plan) -> dict[str, Any]:
    """The workflow as the frontend saves it, with where its nodes and models come from."""
    nodes = {
        name: dataclasses.asdict(node)
        | {
            "values": {k: v for k, v in node.inputs.items() if not isinstance(v, list)},
            "links": {k: v for k, v in node.inputs.items() if isinstance(v, list)},
            "width": WIDTH.get(node.type, USUAL),
        }
        for name, node in plan.nodes.items()
    }
    saved, ids = browser.run_script(page, "build_workflow", [plan.note, NOTE, nodes, GAP])
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
    saved = drop_nulls(saved)
    saved["id"] = "00000000-0000-0000-0000-000000000000"
    saved["extra"] = {"ds": {"scale": 0.7, "offset": [60, 150]}}
    return saved


def drop_nulls(saved: Any) -> Any:
    """The same without null properties, except the links of unconnected inputs."""
    if isinstance(saved, dict):
        return {k: drop_nulls(v) for k, v in saved.items() if v is not None or k == "link"}
    return [drop_nulls(v) for v in saved] if isinstance(saved, list) else saved


def save_thumbnail(page: Page, file: Path, saved: dict[str, Any]) -> None:
    """The thumbnail: the whole workflow as it opens."""
    browser.open_workflow(page, file)
    right = max(node["pos"][0] + node["size"][0] for node in saved["nodes"])
    bottom = max(node["pos"][1] + node["size"][1] for node in saved["nodes"])
    scale = min((VIEW[0] - 120) / right, (VIEW[1] - 190) / (bottom + 40))
    opened = browser.screenshot(page, (80 / scale, 150 / scale, scale), 1000)
    shown = opened.crop((60, 110, 60 + int(right * scale) + 40, 130 + int((bottom + 40) * scale)))
    ImageOps.pad(shown, THUMBNAIL, LANCZOS, CANVAS).save(file.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
