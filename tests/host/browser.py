"""The real frontend in headless Chromium: opens a workflow as a user would, and queues it from there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from .server import ComfyServer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]

# No SDXL file is at hand here: what the SDXL loader and the two text encoders give, the tiny model gives.
USE_TINY_SDXL = """([mllm, references]) => {
    const of = type => app.graph._nodes.filter(node => node.type === type)
    const [loader] = of('CheckpointLoaderSimple'), texts = of('CLIPTextEncode')
    const tiny = LiteGraph.createNode('TinySDXL')
    tiny.pos = loader.pos
    app.graph.add(tiny)
    const hand = (node, output, tinyOutput) => {
        for (const id of [...(node.outputs[output].links ?? [])]) {
            const link = app.graph.links[id] ?? app.graph.links.get(id)
            tiny.connect(tinyOutput, app.graph.getNodeById(link.target_id), link.target_slot)
        }
    }
    hand(loader, 0, 0)
    hand(loader, 2, 3)
    hand(texts[0], 0, 1)
    hand(texts[1], 0, 2)
    for (const node of [loader, ...texts]) app.graph.remove(node)
    const set = (type, name, value) => of(type).forEach((node, i) => {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = Array.isArray(value) ? value[i] : value
        widget.callback?.(widget.value)
    })
    set('EasyRefLoader', 'mllm', mllm)
    set('LoadImage', 'image', references)
    set('EmptyLatentImage', 'width', 256)
    set('EmptyLatentImage', 'height', 256)
    set('KSampler', 'steps', 4)
    set('EasyRefEncodeGroup', 'size', 84)
}"""


@contextlib.contextmanager
def frontend(server: ComfyServer, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """The frontend's page, once it knows this pack's nodes."""
    from playwright.sync_api import sync_playwright

    server.post("/api/settings", {"Comfy.TutorialCompleted": True})
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.goto(server.url)
        page.wait_for_function(
            "() => !!window.LiteGraph?.registered_node_types['EasyRefApply'] && !!window.app?.canvas",
            timeout=60_000,
        )
        yield page
        chromium.close()


def open_workflow(page: Page, workflow: Path) -> list[str]:
    """Load a workflow file; the types of the nodes that the frontend does not know."""
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(workflow.read_text(encoding="utf-8")))
    page.wait_for_timeout(500)
    return page.evaluate(
        "() => app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])"
    )


def queue(server: ComfyServer, page: Page, timeout: float = 120) -> dict[str, Any]:
    """Press Run; the history entry of the prompt that the page queued."""
    before = set(json.loads(server.get("/history")))
    page.evaluate("() => app.queuePrompt(0)")
    deadline = timeout
    while deadline > 0:
        history = json.loads(server.get("/history"))
        if new := set(history) - before:
            return history[new.pop()]
        page.wait_for_timeout(200)
        deadline -= 0.2
    raise TimeoutError(f"the page queued no prompt that ended within {timeout} s")
