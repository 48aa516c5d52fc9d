"""The real frontend in headless Chromium: opens workflows and queues them as a user would."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from devkit.host.server import ComfyServer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync".split()

# Replaces the loaders of files that the tests do not have, and both text encoders, by the tiny models of the
# tests.
USE_TINY_MODELS = """() => {
    const of = type => app.graph._nodes.filter(node => node.type === type)
    const add = (type, other) => {
        const node = LiteGraph.createNode(type)
        node.pos = other.pos
        app.graph.add(node)
        return node
    }
    const move = (node, output, other, otherOutput) => {
        for (const id of [...(node.outputs[output].links ?? [])]) {
            const link = app.graph.links[id] ?? app.graph.links.get(id)
            other.connect(otherOutput, app.graph.getNodeById(link.target_id), link.target_slot)
        }
    }
    const widget = (node, name) => node.widgets.find(widget => widget.name === name)
    const [checkpoint] = of('CheckpointLoaderSimple'), texts = of('CLIPTextEncode')
    const tiny = add('TinySDXL', checkpoint)
    move(checkpoint, 0, tiny, 0)
    move(checkpoint, 2, tiny, 3)
    for (const text of texts) move(text, 0, tiny, text.title.startsWith('Negative') ? 2 : 1)
    for (const net of of('ControlNetLoader')) move(net, 0, add('TinyControlNet', net), 0)
    for (const lora of of('LoraLoader')) {
        const other = add('LoraLoaderModelOnly', lora)
        tiny.connect(0, other, 0)
        move(lora, 0, other, 0)
        for (const name of ['lora_name', 'strength_model'])
            widget(other, name).value = widget(lora, name).value
    }
    const replaced = [checkpoint, ...texts, ...of('ControlNetLoader'), ...of('LoraLoader')]
    for (const node of replaced) app.graph.remove(node)
}"""

SET_WIDGETS = """values => {
    for (const [type, widgets] of Object.entries(values))
        app.graph._nodes.filter(node => node.type === type).forEach((node, i) => {
            for (const [name, value] of Object.entries(widgets)) {
                const widget = node.widgets.find(widget => widget.name === name)
                widget.value = Array.isArray(value) ? value[i % value.length] : value
                widget.callback?.(widget.value)
            }
        })
}"""

# The frontend first opens a workflow of its own, which would replace one that is opened earlier.
READY = """() => !!window.LiteGraph?.registered_node_types['EasyRefApply'] && !!window.app?.canvas
    && !!app.extensionManager?.workflow?.activeWorkflow"""

SELECT = """id => {
    const node = app.graph.getNodeById(id)
    app.canvas.centerOnNode(node)
    app.canvas.selectNode(node)
}"""

RANDOMIZE_SEEDS = """() => app.graph._nodes.filter(node => node.type === 'KSampler').map(node => {
    const source = node.getInputNode(node.findInputSlot('seed')) ?? node
    const seed = source.widgets.find(widget => widget.linkedWidgets)
    seed.linkedWidgets[0].value = 'randomize'
    return `${source.id}`
})"""


@contextlib.contextmanager
def frontend(server: ComfyServer, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """Open the frontend's page, and wait until this pack's nodes are registered."""
    from playwright.sync_api import sync_playwright

    server.post("/api/settings", {"Comfy.TutorialCompleted": True})
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        yield page
        chromium.close()


def open_workflow(page: Page, workflow: Path) -> list[str]:
    """Load a workflow file, and return the node types that the frontend does not know."""
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(workflow.read_text(encoding="utf-8")))
    page.wait_for_timeout(500)
    return page.evaluate(
        "() => app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])"
    )


def use_tiny_models(page: Page, side: int = 128, steps: int = 2) -> None:
    """Replace the models and references of the open workflow by tiny ones, for images of `side` pixels."""
    page.evaluate(USE_TINY_MODELS)
    size = {"width": side, "height": side}
    values = {
        "EasyRefLoader": {"mllm": "easyref/golden-qwen2-vl"},
        "EasyRefEncodeGroup": {"size": 84},
        "LoadImage": {"image": ["0.png", "1.png", "2.png"]},
        "EmptyLatentImage": size,
        "SolidMask": {**size, "width": [side, side // 2]},
        "KSampler": {"steps": steps},
    }
    set_widgets(page, values)


def set_widgets(page: Page, values: dict[str, dict[str, Any]]) -> None:
    """Set widgets. values: {node type: {widget: value, or one value for each node of the type}}."""
    page.evaluate(SET_WIDGETS, values)


def randomize_seeds(page: Page) -> list[str]:
    """Randomize seeds after each Run, and return the ids of the nodes with the samplers' seeds."""
    return page.evaluate(RANDOMIZE_SEEDS)


def queue(server: ComfyServer, page: Page, timeout: float = 120) -> dict[str, Any]:
    """Press Run, and return the history entry of the queued prompt."""
    return queued(server, page, lambda: page.evaluate("() => app.queuePrompt(0)"), timeout)


def queue_selected(server: ComfyServer, page: Page, node: str) -> dict[str, Any]:
    """Select a node, press the play button above it, and return the history entry of the queued prompt."""
    page.evaluate(SELECT, node)
    return queued(server, page, page.get_by_label("Execute to selected output nodes").click)


def queued(
    server: ComfyServer, page: Page, press: Callable[[], object], timeout: float = 120
) -> dict[str, Any]:
    """Press a button, and return the history entry of the prompt that the page queues."""
    before = set(json.loads(server.get("/history")))
    press()
    deadline = timeout
    while deadline > 0:
        history = json.loads(server.get("/history"))
        if new := set(history) - before:
            return history[new.pop()]
        page.wait_for_timeout(200)
        deadline -= 0.2
    raise TimeoutError(f"the page queued no prompt that ended within {timeout} s")


def executed(history: dict[str, Any]) -> set[str]:
    """Return the nodes of a history entry whose outputs did not come from the cache."""
    cached = next(
        data["nodes"] for event, data in history["status"]["messages"] if event == "execution_cached"
    )
    return set(history["prompt"][2]) - set(cached)
