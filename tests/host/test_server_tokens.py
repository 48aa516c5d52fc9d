"""Reference tokens through the server: saved, loaded, combined, batched, and with other negatives."""

from __future__ import annotations

import pytest

from devkit.host import golden, graphs
from devkit.host.graphs import node
from devkit.host.server import pixels


@pytest.fixture(scope="module", autouse=True)
def _golden(server) -> None:
    graphs.install_golden(server)


@pytest.fixture(scope="module")
def patched(server) -> bytes:
    """The image of the whole path with default settings."""
    return graphs.image(server, graphs.easyref())


def through(nodes: graphs.Graph, aggregate: dict | None = None) -> graphs.Graph:
    """The whole path with nodes between Aggregate and Apply; the node "tokens" is linked to Apply."""
    graph = {**graphs.easyref(apply={"tokens": ["tokens", 0]} if "tokens" in nodes else None), **nodes}
    graph["aggregate"]["inputs"] |= aggregate or {}
    return graph


def other_group() -> graphs.Graph:
    """A second group with the first reference alone: its context and its tokens."""
    text = {"prompt": "a dog", "instruction": golden.SETTINGS["instruction"], "size": golden.SIZE}
    return {
        "other": node("EasyRefEncodeGroup", easyref=["load", 0], group=["image0", 0], **text),
        "other tokens": node("EasyRefAggregate", easyref=["load", 0], context=["other", 0]),
    }


def combine(*links: list, **inputs: object) -> graphs.Graph:
    sockets = {f"tokens.tokens{i}": link for i, link in enumerate(links)}
    settings = {"method": "concat", "factor": 0.5, "weights": "", **inputs}
    return {"tokens": node("EasyRefCombineTokens", **sockets, **settings)}


def test_saved_tokens_give_the_same_image_without_the_mllm(server, patched):
    links = {"tokens": ["aggregate", 0], "references": ["group", 0]}
    keep = node("EasyRefSaveTokens", filename_prefix="tests/猫", **links)
    output = server.run(through({"keep": keep}))["outputs"]["keep"]
    (saved,) = output["easyref_tokens"]
    assert saved == {"filename": "猫_00001_.safetensors", "subfolder": "easyref/tests", "type": "output"}
    assert len(output["images"]) == 3

    file = "tests/猫_00001_.safetensors"
    listed = server.object_info()["EasyRefLoadTokens"]["input"]["required"]["file"]
    assert file in listed[1]["options"]
    graph = through({"tokens": node("EasyRefLoadTokens", file=file)})
    for name in ("image0", "image1", "image2", "group", "encode", "aggregate"):
        del graph[name]
    outputs = server.run(graph)["outputs"]
    assert len(outputs.pop("tokens")["images"]) == 3  # the thumbnails
    (png,) = server.images({"outputs": outputs})
    assert pixels(png).tobytes() == patched


@pytest.mark.parametrize("file", ["../../input/0.png", "/etc/passwd", "gone.safetensors"])
def test_files_outside_the_folders_are_not_found(server, file: str):
    graph = through({"tokens": node("EasyRefLoadTokens", file=file)})
    assert "was not found" in graphs.failure(server, graph)


def test_joined_groups_make_another_image_and_one_set_the_same(server, patched):
    assert graphs.image(server, through(combine(["aggregate", 0]))) == patched
    links = ["aggregate", 0], ["other tokens", 0]
    assert graphs.image(server, through({**other_group(), **combine(*links)})) != patched
    left_out = combine(*links, weights="1, 0")
    assert graphs.image(server, through({**other_group(), **left_out})) == patched


def test_negatives(server, patched):
    of_group = {"negative": "group", "negative_context": ["other", 0]}
    noise = {"negative": "noise", "noise_seed": 3, "noise_strength": 1.0}
    images = [graphs.image(server, through(other_group(), settings)) for settings in (of_group, noise)]
    assert len({patched, *images}) == 3
    for neutral in ({"negative": "black image"}, {**noise, "noise_strength": 0.0}):
        assert graphs.image(server, through({}, neutral)) == patched

    connected = graphs.image(server, through(other_group(), {"negative_context": ["other", 0]}))
    assert connected == images[0]
    graph = through(other_group(), {"negative": "noise", "negative_context": ["other", 0]})
    assert "would not use it" in graphs.failure(server, graph)
