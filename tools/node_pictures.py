"""Renew the images of the help pages: every node of the pack as the frontend draws it.

python tools/node_pictures.py [node ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from devkit import pictures
from devkit.host import browser, graphs
from devkit.host.locales import PACK
from devkit.host.server import ComfyServer
from devkit.hosts import ROOT, find_hosts

if TYPE_CHECKING:
    from playwright.sync_api import Page

SCALE, EDGE = 1.3, 14  # of the canvas; pixels left free around a node
TITLE_BAR = 30  # pixels, at scale 1
PLACE = (200, 140)  # pixels, where the node's corner is on the page


def main() -> None:
    with ComfyServer(find_hosts()[0]) as server:
        graphs.install_golden(server)
        ours = [name for name, node in server.object_info().items() if node["python_module"] == PACK]
        with browser.frontend(server, 1300, 1100) as page:
            for name in sys.argv[1:] or sorted(ours):
                file = pictures.HELP / f"{name}.png"
                drawn(page, name).quantize(64).save(file, optimize=True)
                pictures.record([file])
                print(f"node_pictures: {file.relative_to(ROOT)}", flush=True)


def drawn(page: Page, name: str) -> Image.Image:
    """One node alone, its title bar included."""
    width, height = browser.run_script(page, "draw_alone", name)
    page.wait_for_timeout(400)
    shot = browser.screenshot(page, (PLACE[0] / SCALE, PLACE[1] / SCALE, SCALE), 400)
    left, top = PLACE[0] - EDGE, int(PLACE[1] - TITLE_BAR * SCALE) - EDGE
    right, bottom = int(PLACE[0] + width * SCALE) + EDGE, int(PLACE[1] + height * SCALE) + EDGE
    return shot.crop((left, top, right, bottom))


if __name__ == "__main__":
    main()
