"""Nodes with a preview run without connected outputs, and do not stop other nodes."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from devkit.host import golden, graphs
from devkit.host.graphs import Graph, node, run
from devkit.host.server import ComfyServer, PromptFailed

pytestmark = pytest.mark.one_host

GROUP = graphs.group(["image", 0], ["image", 0])
IN_FACES = {"folder": "faces", "limit": 2, "start": 0}
TEXT = {"prompt": "a cat", "instruction": golden.SETTINGS["instruction"], "size": golden.SIZE}
BUDGET = node("EasyRefGroupBudget", easyref=["load", 0], group=["group", 0], **TEXT)
SHOWING: dict[str, tuple[dict[str, Any], str]] = {
    "budget": (BUDGET, "It fits."),
    "group": (GROUP, "2 references"),
    "folder": (node("EasyRefGroupFromFolder", **IN_FACES), "2 references"),
    "crop": (
        node("EasyRefCropReference", images=["image", 0], crop="square in the middle", padding=1.5),
        "Nothing is cropped.",
    ),
    "select": (node("EasyRefSelectReferences", group=["group", 0], references="2"), "1 reference"),
    "instruction": (node("EasyRefInstruction", preset="custom", language="English", text="Look."), "Look."),
    "pairs": (node("EasyRefWeightSheet", weights="0.5, 1", end_percents="1"), "2 pairs."),
}
UNFINISHED = {
    "group without links": graphs.group(),
    "folder without a name": node("EasyRefGroupFromFolder", **{**IN_FACES, "folder": ""}),
    "budget without links": node("EasyRefGroupBudget", **TEXT),
    "tokens without a file": node("EasyRefLoadTokens", file="no file in output/easyref"),
}


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer) -> None:
    (server.base / "input" / "faces").mkdir(exist_ok=True)
    for number in range(2):
        shutil.copy(server.base / "input" / "0.png", server.base / "input" / "faces" / f"{number}.png")


def sources() -> Graph:
    """The nodes that the ones above are linked to; only the group is an output node."""
    load = graphs.easyref()["load"]
    return {"load": load, "image": node("LoadImage", image="0.png"), "group": GROUP}


@pytest.mark.parametrize("name", SHOWING)
def test_it_runs_alone_once_and_shows_it_again_from_the_cache(server, name: str):
    entry, text = SHOWING[name]
    graph = {**sources(), name: entry}
    _, outputs = run(server, graph)
    assert outputs[name]["text"][0].startswith(text)
    assert run(server, graph) == (set(), outputs)


def test_saved_tokens_show_their_references_alone(server):
    inputs = {"tokens": ["aggregate", 0], "filename_prefix": "alone", "references": ["group", 0]}
    run(server, {**graphs.tokens(), "save tokens": node("EasyRefSaveTokens", **inputs)})
    _, outputs = run(server, {"tokens": node("EasyRefLoadTokens", file="alone_00001_.safetensors")})
    assert len(outputs["tokens"]["images"]) == 3


def test_outputs_of_the_budget_can_be_connected(server):
    graph = {**graphs.easyref(encode={"size": ["budget", 1]}), "budget": BUDGET}
    executed, outputs = run(server, graph)
    assert {"budget", "encode", "save"} <= executed
    assert f"{golden.SIZE} pixels" in outputs["budget"]["text"][0]


@pytest.mark.parametrize("name", ["encode", "weigh"])
def test_nothing_is_encoded_only_to_be_shown(server, name: str):
    encode = node("EasyRefEncodeGroup", easyref=["load", 0], group=["group", 0], **TEXT)
    weigh = node("EasyRefWeighReferences", context=["encode", 0], weights="")
    executed, _ = run(server, {**sources(), "encode": encode, "weigh": weigh})
    assert name not in executed


def test_text_of_the_encoding_is_there_when_it_comes_from_the_cache(server):
    graph = graphs.easyref()
    graph["weigh"] = node("EasyRefWeighReferences", context=["encode", 0], weights="1, 1, 1")
    graph["aggregate"]["inputs"]["context"] = ["weigh", 0]
    _, first = run(server, graph)
    executed, second = run(server, graph)
    assert executed == set()
    assert second["encode"] == first["encode"]
    assert second["weigh"]["text"] == ["reference 1: 1\nreference 2: 1\nreference 3: 1"]


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_node_does_not_stop_the_others(server, name: str):
    graph = {**sources(), name: UNFINISHED[name]}
    answer = json.loads(server.post("/prompt", {"prompt": graph, "client_id": server.client_id}))
    assert list(answer["node_errors"]) == [name]
    assert server.wait(answer["prompt_id"])["outputs"].keys() == {"group"}


def test_unfinished_node_fails_before_anything_runs(server):
    errors = {}
    for name, entry in UNFINISHED.items():
        with pytest.raises(PromptFailed) as failed:
            server.run({name: entry})
        assert failed.value.kind == "invalid"
        errors[name] = str(failed.value)
    assert "The reference group is empty. Connect at least one image" in errors["group without links"]
    assert "is not inside ComfyUI's input folder" in errors["folder without a name"]
