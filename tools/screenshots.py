"""Renew docs/try_it_now.png, the README's screenshot of try_it_now after a run, in the real frontend.

python tools/screenshots.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from devkit import pictures
from devkit.host import browser
from devkit.host.server import ComfyServer
from devkit.hosts import ROOT, find_hosts
from tools.workflow_layout import extent

WORKFLOW = ROOT / "workflows" / f"{pictures.SCREENSHOT.stem}.json"
VIEW = (2300, 1000)  # pixels
TOP, EDGE = 60, 20  # pixels: of the frontend's bars, and left free around the workflow
WIDTH = 1494  # pixels, of the file
NOTICES = 6000  # milliseconds until the frontend's notices are gone


def main() -> None:
    left, top, right, bottom = extent(json.loads(WORKFLOW.read_text(encoding="utf-8")))
    free = VIEW[0] - 2 * EDGE - TOP, VIEW[1] - 2 * EDGE - TOP
    scale = min(free[0] / (right - left), free[1] / (bottom - top))
    offset = (TOP + EDGE) / scale - left, (TOP + EDGE) / scale - top
    with ComfyServer(find_hosts()[0]) as server, browser.frontend(server, *VIEW) as page:
        browser.open_workflow(page, WORKFLOW)
        browser.queue(server, page)
        ran = browser.screenshot(page, (*offset, scale), NOTICES)
    size = int(scale * (right - left)) + 2 * EDGE, int(scale * (bottom - top)) + 2 * EDGE
    shown = ran.crop((TOP, TOP, TOP + size[0], TOP + size[1]))
    shown = shown.resize((WIDTH, WIDTH * size[1] // size[0]), Image.Resampling.LANCZOS)
    shown.save(pictures.SCREENSHOT, optimize=True)
    pictures.record([pictures.SCREENSHOT])


if __name__ == "__main__":
    main()
