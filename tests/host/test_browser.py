"""The shipped workflows in the real frontend: they open with nothing missing, are queued from the page, end in pictures."""

from __future__ import annotations

import json
import shutil

import pytest

from ..hosts import ROOT
from . import browser, graphs
from .server import pixels

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH")

WORKFLOW = ROOT / "workflows" / "easyref_basic.json"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TRY_IT_NOW = ROOT / "workflows" / "try_it_now.json"


@pytest.fixture(scope="module")
def page(server):
    graphs.install_golden(server)
    example = server.host / "input" / "example.png"
    shutil.copy(example, server.base / "input" / example.name)
    with browser.frontend(server) as page:
        yield page


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_is_missing(page, workflow) -> None:
    assert browser.open_workflow(page, workflow) == []


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
    page.evaluate(browser.USE_TINY_SDXL, ["easyref/golden-qwen2-vl", ["0.png", "1.png", "2.png"]])
    history = browser.queue(server, page)
    assert history["status"]["status_str"] == "success", history["status"]
    assert len(server.images(history, "output")) == 1


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_it_is_in_the_template_browser(server, workflow) -> None:
    templates = json.loads(server.get("/workflow_templates"))
    assert workflow.stem in templates["ComfyUI-EasyRef"]
    for suffix in ("json", "jpg"):
        assert server.get(f"/api/workflow_templates/ComfyUI-EasyRef/{workflow.stem}.{suffix}")


# The prompt of both readers


def test_one_text_node_is_read_by_clip_and_mllm_as_it_is(page) -> None:
    browser.open_workflow(page, WORKFLOW)
    typed = "a {red|blue} (cat:1.2) // a note"
    output = page.evaluate(
        """async typed => {
            const text = app.graph._nodes.find(node => node.type === 'PrimitiveStringMultiline')
            text.widgets[0].value = typed
            return (await app.graphToPrompt()).output
        }""",
        typed,
    )
    encode = next(node for node in output.values() if node["class_type"] == "EasyRefEncodeGroup")
    source = encode["inputs"]["prompt"]
    readers = [
        node["class_type"]
        for node in output.values()
        if source in (node["inputs"].get("text"), node["inputs"].get("prompt"))
    ]
    assert sorted(readers) == ["CLIPTextEncode", "EasyRefEncodeGroup"]
    assert output[source[0]]["inputs"]["value"] == typed


def test_a_choice_is_drawn_for_clip_alone(page) -> None:
    """So that the MLLM's node finds it and refuses it, in place of drawing another one."""
    typed = page.evaluate(
        """async typed => {
            app.graph.clear()
            for (const [type, name] of [['CLIPTextEncode', 'text'], ['EasyRefEncodeGroup', 'prompt'],
                                        ['EasyRefReferenceInfluence', 'prompt'], ['EasyRefGroupBudget', 'prompt']]) {
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                node.widgets.find(widget => widget.name === name).value = typed
            }
            const output = (await app.graphToPrompt()).output
            return Object.fromEntries(Object.values(output).map(
                node => [node.class_type, node.inputs.text ?? node.inputs.prompt]))
        }""",
        "{red|blue}",
    )
    assert typed.pop("CLIPTextEncode") in ("red", "blue")
    assert typed == dict.fromkeys(
        ("EasyRefEncodeGroup", "EasyRefReferenceInfluence", "EasyRefGroupBudget"), "{red|blue}"
    )


# The workflow that needs no file


def test_try_it_now_runs_as_it_is_opened(server, page) -> None:
    browser.open_workflow(page, TRY_IT_NOW)
    history = browser.queue(server, page)
    assert history["status"]["status_str"] == "success", history["status"]
    shown = pictures_by_title(server, history)
    assert {title: len(pictures) for title, pictures in shown.items()} == {
        "References": 4,
        "Without EasyRef": 4,
        "With EasyRef": 4,
    }
    assert {picture.shape for pictures in shown.values() for picture in pictures} == {(256, 256, 3)}
    without, with_easyref = shown["Without EasyRef"], shown["With EasyRef"]
    assert all((a != b).any() for a, b in zip(without, with_easyref, strict=True))


def pictures_by_title(server, history) -> dict[str, list]:
    """What each preview of the workflow showed."""
    graph = graphs.from_file(TRY_IT_NOW)
    return {
        graph[node]["_meta"]["title"]: [pixels(png) for png in server.images({"outputs": {node: output}})]
        for node, output in history["outputs"].items()
        if "images" in output
    }


def test_try_it_now_read_without_the_page_is_the_same(page) -> None:
    """What `make demo` runs is what the frontend queues."""
    browser.open_workflow(page, TRY_IT_NOW)
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    read = graphs.from_file(TRY_IT_NOW)
    assert {number: node["class_type"] for number, node in read.items()} == {
        number: node["class_type"] for number, node in queued.items()
    }
    for number, node in read.items():  # some frontends add inputs of their own to previews
        inputs = queued[number]["inputs"]
        assert node["inputs"] == {name: inputs[name] for name in inputs if name in node["inputs"]}
