"""The shipped workflow, in the real frontend: opens with nothing missing, is queued from the page, ends in a picture."""

from __future__ import annotations

import shutil

import pytest

from ..hosts import ROOT
from . import browser, graphs

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH")

WORKFLOW = ROOT / "workflows" / "easyref_basic.json"


@pytest.fixture(scope="module")
def page(server):
    graphs.install_golden(server)
    example = server.host / "input" / "example.png"
    shutil.copy(example, server.base / "input" / example.name)
    with browser.frontend(server) as page:
        yield page


def test_no_node_is_missing(page) -> None:
    assert browser.open_workflow(page, WORKFLOW) == []


def test_every_link_survives_loading(page) -> None:
    browser.open_workflow(page, WORKFLOW)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert [name for name in by_type["EasyRefGroup"] if name.startswith("images.")] == [
        "images.image0",
        "images.image1",
        "images.image2",
    ]
    for kind, names in {
        "EasyRefEncodeGroup": ("easyref", "group", "prompt"),
        "EasyRefAggregate": ("easyref", "context"),
        "EasyRefApply": ("model", "easyref", "tokens"),
        "KSampler": ("model", "positive", "negative", "latent_image"),
    }.items():
        assert all(isinstance(by_type[kind][name], list) for name in names), kind


def test_defaults_are_the_authors(page) -> None:
    browser.open_workflow(page, WORKFLOW)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert (by_type["KSampler"]["steps"], by_type["KSampler"]["cfg"]) == (30, 5)
    assert (by_type["EmptyLatentImage"]["width"], by_type["EmptyLatentImage"]["height"]) == (1024, 1024)
    assert (by_type["EasyRefApply"]["weight"], by_type["EasyRefApply"]["lora_strength"]) == (1, 1)


def test_queued_from_the_page_it_ends_in_a_picture(server, page) -> None:
    browser.open_workflow(page, WORKFLOW)
    page.evaluate(browser.USE_TINY_SDXL, ["easyref/tiny-qwen2-vl", ["0.png", "1.png", "2.png"]])
    history = browser.queue(server, page)
    assert history["status"]["status_str"] == "success", history["status"]
    assert len(server.images(history)) == 1


def test_it_is_in_the_template_browser(server) -> None:
    import json

    templates = json.loads(server.get("/workflow_templates"))
    assert "easyref_basic" in templates["ComfyUI-EasyRef"]
    for suffix in ("json", "jpg"):
        assert server.get(f"/api/workflow_templates/ComfyUI-EasyRef/easyref_basic.{suffix}")
