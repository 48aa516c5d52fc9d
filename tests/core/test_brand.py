"""The icon and the banner: sizes that the registry accepts, and pixels of today's tools/brand.py."""

from __future__ import annotations

import runpy

import numpy as np
import pytest
from PIL import Image

from devkit.hosts import ROOT
from devkit.project import pyproject

COMFY = pyproject()["tool"]["comfy"]
BRAND = runpy.run_path(str(ROOT / "tools" / "brand.py"))
DRAWN = {"Icon": BRAND["icon"], "Banner": BRAND["banner"]}
MAX_DIFFERENCE = 1.0  # of 255, on average; FreeType versions differ in the edges of letters


def committed(key: str) -> Image.Image:
    """The image that [tool.comfy] names, from the checkout."""
    before, branch, path = COMFY[key].partition("/main/")
    assert before == "https://raw.githubusercontent.com/ComfyUI-EasyRef/ComfyUI-EasyRef"
    assert branch
    return Image.open(ROOT / path)


@pytest.mark.parametrize("key", DRAWN)
def test_file_is_what_the_script_draws(key: str) -> None:
    file, drawn = committed(key), DRAWN[key]()
    assert (file.size, file.mode) == (drawn.size, drawn.mode)
    difference = np.asarray(file, np.float32) - np.asarray(drawn, np.float32)
    assert np.abs(difference).mean() < MAX_DIFFERENCE, "run `python tools/brand.py`"


def test_sizes_are_those_of_the_registry() -> None:
    icon, banner = committed("Icon"), committed("Banner")
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21
