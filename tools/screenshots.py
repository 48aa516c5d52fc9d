"""Renews the pictures of the workflow: its thumbnail for the template browser, and the README's screenshot.

The screenshot is of the workflow after it ran, in the real frontend, with the tiny random models of the tests in the
place of SDXL and the released checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from tests.host import browser, graphs
from tests.host.server import ComfyServer
from tests.hosts import ROOT, find_hosts

WORKFLOW = ROOT / "workflows" / "easyref_basic.json"
VIEW = (2300, 880)  # pixels
FRAME = """([x, y, scale]) => {
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [x, y]
    app.canvas.setDirty(true, true)
    for (const part of ['.graph-canvas-menu', '.minimap-main-container', '.p-toast', '.litegraph-minimap'])
        document.querySelectorAll(part).forEach(element => element.remove())
}"""


def main() -> None:
    with ComfyServer(find_hosts()[0]) as server:
        graphs.install_golden(server)
        shutil.copy(server.host / "input" / "example.png", server.base / "input")
        sdxl = server.base / "models" / "checkpoints" / "sd_xl_base_1.0.safetensors"
        sdxl.parent.mkdir(exist_ok=True)
        sdxl.touch()  # the frontend marks loaders whose file is missing
        server.post("/api/settings", {"Comfy.Minimap.Visible": False})
        with browser.frontend(server, *VIEW) as page, tempfile.TemporaryDirectory() as folder:
            shot = Path(folder) / "shot.png"
            browser.open_workflow(page, WORKFLOW)
            page.evaluate(FRAME, [640, 140, 0.74])
            page.wait_for_timeout(1000)
            page.screenshot(path=shot)
            thumbnail = Image.open(shot).convert("RGB").crop((460, 60, 1660, 735))
            thumbnail.resize((800, 450), Image.Resampling.LANCZOS).save(
                WORKFLOW.with_suffix(".jpg"), quality=85
            )

            page.evaluate(browser.USE_TINY_SDXL, ["easyref/tiny-qwen2-vl", ["0.png", "1.png", "2.png"]])
            browser.queue(server, page)
            page.evaluate(FRAME, [640, 140, 0.74])
            page.wait_for_timeout(6000)  # until the notices are gone
            page.screenshot(path=shot)
            screenshot = Image.open(shot).convert("RGB").crop((60, 60, VIEW[0], VIEW[1]))
            screenshot.resize((1494, 547), Image.Resampling.LANCZOS).save(
                ROOT / "docs" / "workflow.png", optimize=True
            )


if __name__ == "__main__":
    main()
