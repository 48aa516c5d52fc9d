"""The shipped workflows in the real frontend: they open without missing nodes, run, and give images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devkit.host import browser, graphs
from devkit.host.server import pixels
from devkit.hosts import ROOT
from tools.workflow_layout import Box

from . import tiny_workflow

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH")

WORKFLOW = ROOT / "workflows" / "easyref_basic.json"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
USUAL = "easyref_basic", "try_it_now"
TINY = [file for file in WORKFLOWS if tiny_workflow.is_tiny(graphs.from_file(file))]
TRY_IT_NOW = ROOT / "workflows" / "try_it_now.json"
WITH_ALL_WIRES = Path(__file__).with_name("saved") / "with_all_wires.json"  # of version 0.1.0


def each(workflows: list[Path]) -> pytest.MarkDecorator:
    """Parametrize by these workflows, all but a few of them thorough: the page takes seconds for each."""
    params = [
        pytest.param(file, id=file.stem, marks=[] if file.stem in USUAL else [pytest.mark.thorough])
        for file in workflows
    ]
    return pytest.mark.parametrize("workflow", params)


@pytest.fixture
def page(opened):
    return opened


def prompt_of(page) -> graphs.Graph:
    """The prompt that the page would queue."""
    return page.evaluate("async () => (await app.graphToPrompt()).output")


@pytest.fixture(params=["LiteGraph", "Vue"])
def renderer(request, page):
    browser.set_renderer(page, request.param)
    yield request.param
    browser.set_renderer(page, "LiteGraph")


@pytest.mark.one_host  # Vue nodes have other sizes in ComfyUI 0.20
@each(WORKFLOWS)
def test_no_node_is_drawn_over_another(page, renderer, workflow) -> None:
    """tests/core/test_workflow_layout.py checks the saved sizes; this, the sizes that are drawn."""
    browser.open_workflow(page, workflow)
    page.wait_for_timeout(browser.RENDERED)
    assert drawn_over(page, workflow) == [], renderer


@pytest.mark.one_host
@each(TINY)
def test_no_node_grows_over_another_in_a_run(server, page, renderer, workflow) -> None:
    """Previews, charts and notes take room that nodes do not have before a run."""
    browser.open_workflow(page, workflow)
    browser.set_widgets(page, {"KSampler": {"steps": 2}})
    assert browser.queue(server, page)["status"]["status_str"] == "success"
    page.wait_for_timeout(browser.RENDERED)
    assert drawn_over(page, workflow) == [], renderer


def drawn_over(page, workflow: Path) -> list[tuple[str, str]]:
    """The titles of the pairs of nodes of an open workflow that overlap as they are drawn."""
    drawn = browser.run_script(page, "boxes")
    assert len(drawn) == len(json.loads(workflow.read_text(encoding="utf-8"))["nodes"])
    boxes = [(title, Box(x, y, x + width, y + height)) for title, (x, y, width, height) in drawn]
    return [
        (one, other)
        for i, (one, box) in enumerate(boxes)
        for other, second in boxes[i + 1 :]
        if box.overlaps(second)
    ]


@each(WORKFLOWS)
def test_workflow_opens_and_is_in_the_template_browser(server, page, workflow) -> None:
    assert browser.open_workflow(page, workflow) == []
    templates = json.loads(server.get("/workflow_templates"))
    assert workflow.stem in templates["ComfyUI-EasyRef"]
    for suffix in ("json", "jpg"):
        assert server.get(f"/api/workflow_templates/ComfyUI-EasyRef/{workflow.stem}.{suffix}")


def test_links_survive_loading_and_defaults_are_the_authors(page) -> None:
    browser.open_workflow(page, WORKFLOW)
    by_type = {node["class_type"]: node["inputs"] for node in prompt_of(page).values()}
    sockets = [name for name in by_type["EasyRefGroup"] if name.startswith("images.")]
    assert sockets == ["images.image0", "images.image1", "images.image2"]
    for kind, names in {
        "EasyRefEncodeGroup": ("easyref", "group", "prompt"),
        "EasyRefAggregate": ("context",),
        "EasyRefApply": ("model", "tokens"),
        "KSampler": ("model", "positive", "negative", "latent_image"),
    }.items():
        assert all(isinstance(by_type[kind][name], list) for name in names), kind
    assert (by_type["KSampler"]["steps"], by_type["KSampler"]["cfg"]) == (30, 5)
    assert (by_type["EmptyLatentImage"]["width"], by_type["EmptyLatentImage"]["height"]) == (1024, 1024)
    assert (by_type["EasyRefApply"]["weight"], by_type["EasyRefApply"]["lora_strength"]) == (1, 1)


@each(WORKFLOWS)
def test_second_run_executes_nothing_and_another_seed_the_sampling(server, page, workflow) -> None:
    browser.open_workflow(page, workflow)
    browser.shorten(page)
    first = browser.queue(server, page)
    assert first["status"]["status_str"] == "success", first["status"]
    assert server.images(first)

    seeds = browser.randomize_seeds(page)  # after the next Run
    second = browser.queue(server, page)
    # older frontends (1.42) add the shown text to the inputs of a Preview Any, which then runs once more
    assert {second["prompt"][2][node]["class_type"] for node in browser.executed(second)} <= {"PreviewAny"}
    third = browser.queue(server, page)
    assert browser.executed(third) == following(third["prompt"][2], seeds)


def following(prompt: graphs.Graph, nodes: list[str]) -> set[str]:
    """These nodes of a prompt and all that depend on them."""
    links = {
        name: {value[0] for value in node["inputs"].values() if isinstance(value, list)}
        for name, node in prompt.items()
    }
    reached, before = set(nodes), set()
    while reached != before:
        before = set(reached)
        reached |= {name for name, sources in links.items() if sources & before}
    return reached


def test_seeds_of_new_nodes_are_fixed(page) -> None:
    """By default the frontend randomizes them."""
    controls = page.evaluate("""() => Object.keys(LiteGraph.registered_node_types)
        .filter(type => type.startsWith('EasyRef'))
        .flatMap(type => (LiteGraph.createNode(type).widgets ?? []).flatMap(widget =>
            (widget.linkedWidgets ?? []).map(control => [`${type}.${widget.name}`, control.value])))""")
    assert dict(controls) == {"EasyRefAggregate.noise_seed": "fixed", "EasyRefDemo.example": "fixed"}


def test_workflows_saved_with_a_randomized_seed_keep_their_values(page) -> None:
    saved = json.loads((ROOT / "workflows" / "style_from_a_group.json").read_text(encoding="utf-8"))
    (aggregate,) = (node for node in saved["nodes"] if node["type"] == "EasyRefAggregate")
    aggregate["widgets_values"] = ["noise", 7, "randomize", 0.25]
    page.evaluate("workflow => app.loadGraphData(workflow)", saved)
    inputs = prompt_of(page)[str(aggregate["id"])]["inputs"]
    assert (inputs["negative"], inputs["noise_seed"], inputs["noise_strength"]) == ("noise", 7, 0.25)
    again = page.evaluate("() => app.graph.serialize()")["nodes"]
    (values,) = (node["widgets_values"] for node in again if node["id"] == aggregate["id"])
    assert values == aggregate["widgets_values"]


def test_workflows_saved_with_easyref_on_every_node_keep_their_links(page) -> None:
    """Its socket was the first of these nodes; since it is optional, it comes after the required ones."""
    browser.open_workflow(page, WITH_ALL_WIRES)
    first = prompt_of(page)
    for number, node in graphs.from_file(WITH_ALL_WIRES).items():
        if node["class_type"].startswith("EasyRef"):
            assert first[number]["inputs"] == node["inputs"], node["class_type"]
    page.evaluate("() => app.loadGraphData(app.graph.serialize())")
    assert prompt_of(page) == first


def test_one_text_node_feeds_clip_and_mllm_unchanged(page) -> None:
    browser.open_workflow(page, WORKFLOW)
    typed = "a {red|blue} (cat:1.2) // a note"
    browser.set_widgets(page, {"PrimitiveStringMultiline": {"value": typed}})
    output = prompt_of(page)
    encode = next(node for node in output.values() if node["class_type"] == "EasyRefEncodeGroup")
    source = encode["inputs"]["prompt"]
    readers = [node["class_type"] for node in output.values() if source in node["inputs"].values()]
    assert sorted(readers) == ["CLIPTextEncode", "EasyRefEncodeGroup"]
    assert output[source[0]]["inputs"]["value"] == typed


def test_choice_is_drawn_for_clip_only(page) -> None:
    """The MLLM's node must receive and refuse it, because a second draw could differ."""
    types = ["EasyRefEncodeGroup", "EasyRefReferenceInfluence", "EasyRefGroupBudget"]
    typed = page.evaluate(
        """async ([typed, types]) => {
            app.graph.clear()
            for (const type of ['CLIPTextEncode', ...types]) {
                const name = type === 'CLIPTextEncode' ? 'text' : 'prompt'
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                node.widgets.find(widget => widget.name === name).value = typed
            }
            const output = (await app.graphToPrompt()).output
            return Object.fromEntries(Object.values(output).map(
                node => [node.class_type, node.inputs.text ?? node.inputs.prompt]))
        }""",
        ["{red|blue}", types],
    )
    assert typed.pop("CLIPTextEncode") in ("red", "blue")
    assert typed == dict.fromkeys(types, "{red|blue}")


ADD_BUDGET = """() => {
    const of = type => app.graph._nodes.find(node => node.type === type)
    const budget = LiteGraph.createNode('EasyRefGroupBudget')
    budget.pos = [0, -500]
    app.graph.add(budget)
    of('EasyRefLoader').connect(0, budget, 0)
    of('EasyRefGroup').connect(0, budget, 1)
    return `${budget.id}`
}"""
SHOWS = """([id, text]) => app.graph.getNodeById(id).widgets.some(widget =>
    widget.name === 'note' && widget.value === text)"""


def test_budget_runs_alone_by_the_button_of_its_selection(server, page) -> None:
    browser.open_workflow(page, WORKFLOW)
    browser.use_tiny_models(page)
    budget = page.evaluate(ADD_BUDGET)
    history = browser.queue_selected(server, page, budget)
    assert history["prompt"][4] == [budget]  # the output nodes that the host runs
    assert server.images(history, "output") == []
    (text,) = history["outputs"][budget]["text"]
    assert text.startswith("It fits.")
    page.wait_for_function(SHOWS, arg=[budget, text], timeout=10_000)
    page.wait_for_timeout(1000)  # some frontends clear what was sent as progress when the run has ended
    assert page.evaluate(SHOWS, [budget, text])


NOTES = """async () => {
    const { api } = await import('/scripts/api.js')
    app.graph.clear()
    const nodes = ['EasyRefGroupBudget', 'EasyRefInstruction'].map(type => LiteGraph.createNode(type))
    nodes.forEach((node, i) => { app.graph.add(node); node.pos = [i * 500, 100] })
    const saved = () => JSON.stringify(app.graph.serialize().nodes.map(node => node.widgets_values))
    const notes = () => nodes.map(node => node.widgets.find(widget => widget.name === 'note')?.value ?? null)
    const executed = ({ id }, output) =>
        api.dispatchCustomEvent('executed', { node: `${id}`, display_node: `${id}`, output })
    const before = saved()
    for (const node of nodes) executed(node, { text: ['a note'] })
    const shown = notes(), unchanged = saved() === before
    const prompt = Object.values((await app.graphToPrompt()).output).flatMap(node => Object.keys(node.inputs))
    api.dispatchCustomEvent('executing', `${nodes[0].id}`)
    executed(nodes[1], null)  // from the cache, which sends no text again
    return { shown, unchanged, prompt: prompt.includes('note'), later: notes() }
}"""


def test_note_of_a_node_stays_until_it_runs_again_and_is_not_saved(page, renderer) -> None:
    assert page.evaluate(NOTES) == {
        "shown": ["a note", "a note"],
        "unchanged": True,
        "prompt": False,
        "later": [None, "a note"],
    }


def test_try_it_now_runs_without_changes(server, page) -> None:
    browser.open_workflow(page, TRY_IT_NOW)
    history = browser.queue(server, page)
    assert history["status"]["status_str"] == "success", history["status"]
    graph = graphs.from_file(TRY_IT_NOW)
    previews = {
        graph[node]["_meta"]["title"]: [pixels(png) for png in server.images({"outputs": {node: output}})]
        for node, output in history["outputs"].items()
        if "images" in output
    }
    titles = ("References", "Without EasyRef", "With EasyRef")
    assert {title: len(images) for title, images in previews.items()} == dict.fromkeys(titles, 4)
    assert {image.shape for images in previews.values() for image in images} == {(256, 256, 3)}
    without, with_easyref = previews["Without EasyRef"], previews["With EasyRef"]
    assert all((a != b).any() for a, b in zip(without, with_easyref, strict=True))


def test_from_file_gives_the_prompt_of_the_page(page) -> None:
    """`make demo` queues the result of from_file."""
    browser.open_workflow(page, TRY_IT_NOW)
    queued, from_file = prompt_of(page), graphs.from_file(TRY_IT_NOW)
    types = [{number: node["class_type"] for number, node in graph.items()} for graph in (from_file, queued)]
    assert types[0] == types[1]
    for number, node in from_file.items():  # some frontends add inputs of their own to previews
        inputs = queued[number]["inputs"]
        assert node["inputs"] == {name: inputs[name] for name in inputs if name in node["inputs"]}


SEARCH = """words => {
    const pinia = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
    return pinia._s.get('nodeDef').nodeSearchService.searchNode(words).map(node => node.name)
}"""


@pytest.mark.parametrize("words", ["image prompt", "face", "character", "qwen", "ipadapter", "ip adapter"])
def test_search_finds_apply_and_encode_first(page, words) -> None:
    ours = [name for name in page.evaluate(SEARCH, words) if name.startswith("EasyRef")]
    assert set(ours[:2]) == {"EasyRefApply", "EasyRefEncodeGroup"}
    assert {"EasyRefReferenceAttention", "EasyRefConsistency", "EasyRefWhereItActs"}.isdisjoint(ours)
