"""Renew the images of the workflows: their thumbnails for the template browser, and the README's screenshots.

All are taken in the real frontend. easyref_basic is shown as it opens, and after a run with the tests' tiny
random models in place of SDXL and the released checkpoint; try_it_now after a run as it is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from devkit.host import browser, graphs
from devkit.host.server import ComfyServer
from devkit.hosts import ROOT, find_hosts

if TYPE_CHECKING:
    from playwright.sync_api import Page

WORKFLOWS = ROOT / "workflows"
VIEW = (2300, 880)  # pixels
THUMBNAIL = (800, 450)
LANCZOS = Image.Resampling.LANCZOS
NOTICES = 6000  # milliseconds until the frontend's notices are gone


def main() -> None:
    with ComfyServer(find_hosts()[0]) as server:
        graphs.install_golden(server)
        shutil.copy(server.host / "input" / "example.png", server.base / "input")
        sdxl = server.base / "models" / "checkpoints" / "sd_xl_base_1.0.safetensors"
        sdxl.parent.mkdir(exist_ok=True)
        sdxl.touch()  # the frontend marks loaders whose file is missing
        with browser.frontend(server, *VIEW) as page:
            basic(server, page)
            try_it_now(server, page)


def basic(server: ComfyServer, page: Page) -> None:
    """The thumbnail of easyref_basic as it opens, docs/workflow.png after a run with tiny models."""
    workflow = WORKFLOWS / "easyref_basic.json"
    browser.open_workflow(page, workflow)
    opened = browser.screenshot(page, (640, 140, 0.74), 1000)
    thumbnail(opened.crop((460, 60, 1660, 735)), workflow)

    browser.use_tiny_models(page, 256, 4)
    browser.queue(server, page)
    ran = browser.screenshot(page, (640, 140, 0.74), NOTICES)
    ran.crop((60, 60, *VIEW)).resize((1494, 547), LANCZOS).save(ROOT / "docs" / "workflow.png", optimize=True)


def try_it_now(server: ComfyServer, page: Page) -> None:
    """The thumbnail of try_it_now and docs/try_it_now.png, both after a run."""
    workflow = WORKFLOWS / "try_it_now.json"
    browser.open_workflow(page, workflow)
    browser.queue(server, page)
    ran = browser.screenshot(page, (-339, 134, 0.88), NOTICES)
    thumbnail(ran.crop((60, 85, 1473, 880)), workflow)
    ran = browser.screenshot(page, (640, 150, 0.8), 1000)
    ran.crop((60, 60, *VIEW)).resize((1494, 547), LANCZOS).save(
        ROOT / "docs" / "try_it_now.png", optimize=True
    )


def thumbnail(image: Image.Image, workflow: Path) -> None:
    image.resize(THUMBNAIL, LANCZOS).save(workflow.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
