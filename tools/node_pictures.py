"""Renews the pictures of the help pages: every node of the pack as the frontend draws it.

python tools/node_pictures.py
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from screenshots import FRAME

from devkit.host import browser, graphs
from devkit.host.locales import PACK
from devkit.host.server import ComfyServer
from devkit.hosts import ROOT, find_hosts

if TYPE_CHECKING:
    from playwright.sync_api import Page

PAGES = ROOT / "web" / "docs"
SCALE, EDGE = 1.3, 14  # of the canvas; pixels left free around a node
PLACE = (200, 140)  # pixels, where the node's corner is on the page
ALONE = """type => {
    app.graph.clear()
    // the frontend keeps values by the node's number and the widget's name, beyond the node itself
    app.graph.last_node_id = window.lastPictured = (window.lastPictured ?? 0) + 1
    const node = LiteGraph.createNode(type)
    app.graph.add(node)
    node.pos = [0, 0]
    const [least, height] = node.computeSize()
    node.setSize([Math.max(340, least), height])
    return [node.size[0], node.size[1]]
}"""


def main() -> None:
    with ComfyServer(find_hosts()[0]) as server:
        graphs.install_golden(server)
        names = [name for name, node in server.object_info().items() if node["python_module"] == PACK]
        server.post("/api/settings", {"Comfy.Minimap.Visible": False})
        with browser.frontend(server, 1300, 1100) as page:
            for name in sorted(names):
                file = PAGES / "pictures" / f"{name}.png"
                file.parent.mkdir(exist_ok=True)
                drawn(page, name).quantize(64).save(file, optimize=True)
                print(f"node_pictures: {file.relative_to(ROOT)}", flush=True)


def drawn(page: Page, name: str) -> Image.Image:
    """One node alone, its title bar included."""
    width, height = page.evaluate(ALONE, name)
    page.wait_for_timeout(400)
    page.evaluate(FRAME, [PLACE[0] / SCALE, PLACE[1] / SCALE, SCALE])
    page.wait_for_timeout(400)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    title = 30 * SCALE
    left, top = PLACE[0] - EDGE, PLACE[1] - title - EDGE
    return shot.crop(
        (left, int(top), int(PLACE[0] + width * SCALE) + EDGE, int(PLACE[1] + height * SCALE) + EDGE)
    )


if __name__ == "__main__":
    main()
