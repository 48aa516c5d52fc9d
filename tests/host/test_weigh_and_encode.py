"""Weigh References between Encode and Aggregate, and what Encode shows and does with a group that is too large."""

from __future__ import annotations

import pytest

from devkit.host import graphs
from devkit.host.server import ComfyServer

pytestmark = pytest.mark.one_host


@pytest.fixture(scope="module", autouse=True)
def _golden(server) -> None:
    graphs.install_golden(server)


def weighing(weights: str) -> graphs.Graph:
    graph = graphs.easyref()
    graph["weigh"] = graphs.node("EasyRefWeighReferences", context=["encode", 0], weights=weights)
    graph["aggregate"]["inputs"]["context"] = ["weigh", 0]
    return graph


def shown(server: ComfyServer, graph: graphs.Graph, node: str) -> str:
    """The text that a node shows."""
    return server.run(graph)["outputs"][node]["text"][0]


def test_weights_of_1_give_the_same_picture_and_others_do_not(server):
    plain = graphs.picture(server, graphs.easyref())
    assert graphs.picture(server, weighing("1, 1, 1")) == plain
    assert graphs.picture(server, weighing("")) == plain
    assert graphs.picture(server, weighing("1, 0, 2")) != plain


def test_another_weight_does_not_read_the_group_again(server):
    graphs.picture(server, weighing("1, 0.5, 1"))
    prompt_id = server.queue(weighing("1, 0.25, 1"))
    server.wait(prompt_id)
    assert "encode" not in server.executed(prompt_id)
    assert {"weigh", "aggregate"} <= set(server.executed(prompt_id))


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ("1, 1", ["2 weights for 3 references"]),
        ("1, x, 1", ["weights has 'x' where a number is wanted", "1, 0.5, 1"]),
        ("1, 0,5, 1", ["weights has '0,5'", "0.5", "0; 5"]),
        ("1, 1, 9", ["reference 3 is 9"]),
    ],
)
def test_weights_that_fit_nothing(server, weights: str, parts: list[str]):
    error = graphs.failure(server, weighing(weights))
    assert all(part in error for part in parts), error


def test_pairs_weigh_the_references_that_they_name(server):
    named = graphs.picture(server, weighing("2-3:0.5"))
    assert named == graphs.picture(server, weighing("1, 0.5, 0.5"))


# Encode


def test_encode_shows_sizes_and_tokens(server):
    text = shown(server, graphs.easyref(encode={"prompt": "shown sizes"}), "encode")
    assert text.startswith("3 references, ")
    assert " tokens." in text
    assert "reference 1: " in text
    assert "Warning" not in text


def test_encode_warns_of_a_small_group(server):
    nodes = {"images": graphs.tiny_images("2x64x64x3", seed=50)}
    text = shown(server, graphs.of_images(["images", 0], nodes), "encode")
    assert "Warning: 2 references" in text


def too_large(choice: str) -> graphs.Graph:
    nodes = {"images": graphs.tiny_images("5x1008x1008x3", seed=60)}
    return graphs.of_images(["images", 0], nodes, encode={"size": 1008, "when_too_large": choice})


def test_a_group_that_is_too_large_is_an_error_unless_asked_otherwise(server):
    assert "too long for the MLLM" in graphs.failure(server, too_large("error"))


def test_the_size_is_lowered_only_as_far_as_needed_and_said(server):
    text = shown(server, too_large("lower the size"), "encode")
    assert "The size was lowered from 1008 to 784 pixels" in text


def test_a_group_that_fits_is_read_at_its_size(server):
    graph = graphs.easyref(encode={"when_too_large": "lower the size"})
    assert graphs.picture(server, graph) == graphs.picture(server, graphs.easyref())
