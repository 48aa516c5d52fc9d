"""The blueprint and the apps in the real frontend: found, linked, reloaded and run, in both renderers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from devkit.host import browser, graphs
from devkit.hosts import ROOT
from tools.workflow_plans import BLUEPRINTS, PLANS

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH")

(NAME,) = BLUEPRINTS
FILE = ROOT / "subgraphs" / f"{NAME}.json"
ONE_NODE, TRY_IT_NOW = (ROOT / "workflows" / f"{name}.json" for name in ("one_node", "try_it_now"))
SEARCH = """words => {
    const pinia = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
    return pinia._s.get('nodeDef').nodeSearchService.searchNode(words).map(node => node.display_name)
}"""
PROMPT = "async () => (await app.graphToPrompt()).output"
RELOAD = "() => app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())))"
SET = "([name, value]) => app.extensionManager.setting.set(name, value)"
SET_OUTSIDE = """([name, value]) => {
    app.graph._nodes.find(node => node.subgraph).widgets.find(widget => widget.name === name).value = value
}"""
BYPASS = "() => { app.graph._nodes.find(node => node.subgraph).mode = 4 }"


@pytest.fixture(params=["LiteGraph", "Vue"])
def page(request, opened) -> Page:
    """The frontend with one of its renderers."""
    opened.evaluate(SET, ["Comfy.VueNodes.Enabled", request.param == "Vue"])
    return opened


def inputs_by_type(prompt: graphs.Graph) -> dict[str, dict[str, Any]]:
    return {node["class_type"]: node["inputs"] for node in prompt.values()}


def test_blueprint_is_served_as_the_file(server) -> None:
    served = json.loads(server.get("/global_subgraphs"))
    (number,) = (number for number, entry in served.items() if entry["name"] == NAME)
    assert served[number]["info"]["node_pack"] == "custom_nodes.ComfyUI-EasyRef"
    data = json.loads(server.get(f"/global_subgraphs/{number}"))["data"]
    assert json.loads(data) == json.loads(FILE.read_text(encoding="utf-8"))


# the search gives words after the first 30 letters of a name too low a score
@pytest.mark.parametrize("words", ["easyref", "style", "face", "character"])
def test_search_finds_the_blueprint(opened, words: str) -> None:
    assert NAME in opened.evaluate(SEARCH, words)


def test_blueprint_has_the_nodes_and_sockets_of_its_plan() -> None:
    saved, plan = json.loads(FILE.read_text(encoding="utf-8")), BLUEPRINTS[NAME]
    (subgraph,) = saved["definitions"]["subgraphs"]
    assert [node["type"] for node in subgraph["nodes"]] == [node.type for node in plan.nodes.values()]
    assert [slot["name"] for slot in subgraph["inputs"]] == list(plan.inputs)
    assert [slot["name"] for slot in subgraph["outputs"]] == list(plan.outputs)
    (node,) = saved["nodes"]
    assert node["type"] == subgraph["id"]
    # a node with sockets that grow would lose links in a subgraph, in the frontends up to 1.58
    assert "EasyRefGroup" not in {inner["type"] for inner in subgraph["nodes"]}


def test_links_and_values_survive_saving_and_reloading(page) -> None:
    browser.open_workflow(page, ONE_NODE)
    page.evaluate(SET_OUTSIDE, ["weight", 0.55])
    first = page.evaluate(PROMPT)
    by_type, expected = inputs_by_type(first), inputs_by_type(graphs.from_file(ONE_NODE))
    assert by_type["EasyRefApply"] == expected["EasyRefApply"] | {"weight": 0.55}
    for name in ("EasyRefLoader", "EasyRefEncodeGroup", "EasyRefAggregate", "EasyRefGroup", "KSampler"):
        assert by_type[name] == expected[name]
    for _ in range(2):
        page.evaluate(RELOAD)
        page.wait_for_timeout(500)
        assert page.evaluate(PROMPT) == first


def test_blueprint_runs_and_its_weight_acts(server, page) -> None:
    browser.open_workflow(page, ONE_NODE)
    browser.use_tiny_models(page)
    images = []
    for weight in (1, 0.5):
        page.evaluate(SET_OUTSIDE, ["weight", weight])
        history = browser.queue(server, page)
        assert history["status"]["status_str"] == "success", history["status"]
        images.append(server.images(history, "output"))
    assert images[0] != images[1]


def test_bypassed_blueprint_passes_the_model_on(page) -> None:
    browser.open_workflow(page, ONE_NODE)
    page.evaluate(BYPASS)
    prompt = page.evaluate(PROMPT)
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler")
    assert prompt[sampler["model"][0]]["class_type"] == "CheckpointLoaderSimple"
    assert "EasyRefApply" not in inputs_by_type(prompt)


def test_one_node_holds_the_blueprint() -> None:
    """Its nodes have other numbers there, because those of a workflow are unique."""
    saved = [json.loads(file.read_text(encoding="utf-8")) for file in (FILE, ONE_NODE)]
    blueprint, used = (workflow["definitions"]["subgraphs"][0] for workflow in saved)
    for key in ("id", "name", "inputs", "outputs"):
        assert used[key] == blueprint[key]
    assert [node["type"] for node in used["nodes"]] == [node["type"] for node in blueprint["nodes"]]


# Apps


def labels_of(page: Page) -> list[str]:
    """The labels of the inputs that an app shows."""
    page.get_by_text("Skip", exact=True).or_(page.get_by_test_id("linear-widgets")).first.wait_for()
    for button in page.get_by_text("Skip", exact=True).all():  # of the tour that the frontend shows once
        button.click()
    return page.get_by_test_id("builder-widget-label").all_inner_texts()


@pytest.fixture
def app(opened) -> Iterator[Page]:
    """The frontend, whose renderer an app changes."""
    yield opened
    opened.evaluate(SET, ["Comfy.VueNodes.Enabled", False])


@pytest.mark.one_host  # the frontend of ComfyUI 0.20.1 has no app mode
def test_one_node_opens_as_an_app(app) -> None:
    browser.open_workflow(app, ONE_NODE, as_app=True)
    assert labels_of(app) == [label for *_, label in PLANS["one_node"].app.inputs]


@pytest.mark.one_host
def test_try_it_now_opens_as_an_app_and_runs(server, app) -> None:
    browser.open_workflow(app, TRY_IT_NOW, as_app=True)
    saved = json.loads(TRY_IT_NOW.read_text(encoding="utf-8"))
    nodes = {str(node["id"]): node for node in saved["nodes"]}
    data = saved["extra"]["linearData"]
    labels = [
        slot["label"]
        for number, widget in data["inputs"]
        for slot in nodes[number]["inputs"]
        if slot["name"] == widget
    ]
    assert len(labels) == 5
    assert labels_of(app) == labels
    assert [nodes[number]["title"] for number in data["outputs"]] == ["Without EasyRef", "With EasyRef"]
    browser.set_widgets(app, {"KSampler": {"steps": 2}})
    history = browser.queue(server, app)
    assert all(history["outputs"][number]["images"] for number in data["outputs"])


def test_apps_name_widgets_and_outputs_that_exist() -> None:
    for file in (ROOT / "workflows").glob("*.json"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        nodes = {str(node["id"]): node for node in saved["nodes"]}
        data = saved["extra"].get("linearData", {"inputs": [], "outputs": []})
        for number, widget in data["inputs"]:
            (slot,) = (slot for slot in nodes[number]["inputs"] if slot["name"] == widget)
            assert slot["label"]
            assert slot["link"] is None
        assert set(data["outputs"]) <= nodes.keys()
        assert bool(data["inputs"]) == saved["extra"].get("linearMode", False)
