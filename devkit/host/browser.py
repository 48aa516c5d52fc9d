"""The real frontend in headless Chromium: opens workflows and queues them as a user would."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from devkit.host.server import ComfyServer

PAGE_SCRIPTS = Path(__file__).with_name("page_scripts")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync".split()

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.Persist": False,  # otherwise a page that is loaded again opens the last workflow
}
SET = "([name, value]) => app.extensionManager.setting.set(name, value)"
OPENS = 300_000  # milliseconds at most until the page is ready; a busy processor takes minutes
RENDERED = 1000  # milliseconds until the other renderer has drawn all nodes

# The frontend first opens a workflow of its own, which would replace one that is opened earlier.
READY = """() => !!window.LiteGraph?.registered_node_types['EasyRefApply'] && !!window.app?.canvas
    && !!app.extensionManager?.workflow?.activeWorkflow"""


@contextlib.contextmanager
def frontend(server: ComfyServer, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """Open the frontend's page, and wait until this pack's nodes are registered."""
    from playwright.sync_api import sync_playwright

    server.post("/api/settings", SETTINGS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.goto(server.url, timeout=OPENS)
        page.wait_for_function(READY, timeout=OPENS)
        yield page
        chromium.close()


def reload(page: Page) -> None:
    """Load the frontend's page again, without the values and images that it keeps of earlier nodes."""
    page.reload(timeout=OPENS)
    page.wait_for_function(READY, timeout=OPENS)


def run_script(page: Page, name: str, argument: Any = None) -> Any:
    """Run page_scripts/<name>.js, a function of one argument, and return its result."""
    return page.evaluate((PAGE_SCRIPTS / f"{name}.js").read_text(encoding="utf-8"), argument)


def screenshot(page: Page, frame: tuple[float, float, float], wait: int) -> Image.Image:
    """The page, `wait` milliseconds after it was moved to `frame` (x, y and scale of the canvas)."""
    run_script(page, "frame", frame)
    page.wait_for_timeout(wait)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def open_workflow(page: Page, workflow: Path, as_app: bool = False) -> list[str]:
    """Load a workflow file, and return the node types that the frontend does not know.

    as_app: as the file says; otherwise an app is opened as a graph, which leaves the renderer as it is.
    """
    saved = json.loads(workflow.read_text(encoding="utf-8"))
    if not as_app:
        saved["extra"].pop("linearMode", None)
    page.evaluate("workflow => app.loadGraphData(workflow)", saved)
    page.wait_for_timeout(500)
    return page.evaluate(
        "() => app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])"
    )


def set_renderer(page: Page, renderer: str) -> None:
    """Draw nodes with "LiteGraph", on the canvas, or with "Vue", as elements of the page."""
    page.evaluate(SET, ["Comfy.VueNodes.Enabled", renderer == "Vue"])
    page.wait_for_timeout(RENDERED)


def use_tiny_models(page: Page, side: int = 128, steps: int = 2) -> None:
    """Replace the models and references of the open workflow by tiny ones, for images of `side` pixels."""
    run_script(page, "use_tiny_models")
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


def shorten(page: Page) -> None:
    """Make the open workflow sample in two steps, with tiny models if it has a checkpoint's."""
    if page.evaluate("() => app.graph._nodes.some(node => node.type === 'CheckpointLoaderSimple')"):
        use_tiny_models(page)
    else:
        set_widgets(page, {"KSampler": {"steps": 2}})


def set_widgets(page: Page, values: dict[str, dict[str, Any]]) -> None:
    """Set widgets. values: {node type: {widget: value, or one value for each node of the type}}."""
    run_script(page, "set_widgets", values)


def randomize_seeds(page: Page) -> list[str]:
    """Randomize seeds after each Run, and return the ids of the nodes with the samplers' seeds."""
    return run_script(page, "randomize_seeds")


def queue(server: ComfyServer, page: Page, timeout: float = 120) -> dict[str, Any]:
    """Press Run, and return the history entry of the queued prompt."""
    return queued(server, page, lambda: page.evaluate("() => app.queuePrompt(0)"), timeout)


def queue_selected(server: ComfyServer, page: Page, node: str) -> dict[str, Any]:
    """Select a node, press the play button above it, and return the history entry of the queued prompt."""
    run_script(page, "select_node", node)
    return queued(server, page, page.get_by_label("Execute to selected output nodes").click)


def queued(
    server: ComfyServer, page: Page, press: Callable[[], object], timeout: float = 120
) -> dict[str, Any]:
    """Press a button, and return the history entry of the prompt that the page queues."""
    before = set(json.loads(server.get("/history")))
    press()
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        history = json.loads(server.get("/history"))
        if new := set(history) - before:
            return history[new.pop()]
        page.wait_for_timeout(200)
    raise TimeoutError(f"the page queued no prompt that ended within {timeout} s")


def executed(history: dict[str, Any]) -> set[str]:
    """Return the nodes of a history entry whose outputs did not come from the cache."""
    cached = next(
        data["nodes"] for event, data in history["status"]["messages"] if event == "execution_cached"
    )
    return set(history["prompt"][2]) - set(cached)
