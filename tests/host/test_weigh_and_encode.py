"""Weigh References between Encode and Aggregate, and how Encode handles groups that are too large."""

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


def text_of_encode(server: ComfyServer, graph: graphs.Graph) -> str:
    return server.run(graph)["outputs"]["encode"]["text"][0]


def test_weights_of_1_give_the_same_image_and_others_do_not(server):
    plain = graphs.image(server, graphs.easyref())
    assert {graphs.image(server, weighing(weights)) for weights in ("1, 1, 1", "")} == {plain}
    assert graphs.image(server, weighing("1, 0, 2")) != plain
    pairs, list_of_all = (graphs.image(server, weighing(text)) for text in ("2-3:0.5", "1, 0.5, 0.5"))
    assert pairs == list_of_all


def test_another_weight_does_not_encode_the_group_again(server):
    graphs.image(server, weighing("1, 0.5, 1"))
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
def test_invalid_weights_are_refused(server, weights: str, parts: list[str]):
    error = graphs.failure(server, weighing(weights))
    assert all(part in error for part in parts), error


# Encode


def test_encode_shows_sizes_and_tokens(server):
    text = text_of_encode(server, graphs.easyref(encode={"prompt": "sizes and tokens"}))
    assert text.startswith("3 references, ")
    assert " tokens." in text
    assert "reference 1: " in text
    assert "Warning" not in text


def test_encode_warns_of_a_small_group(server):
    nodes = {"images": graphs.tiny_images("2x64x64x3", seed=50)}
    assert "Warning: 2 references" in text_of_encode(server, graphs.of_images(["images", 0], nodes))


def test_group_that_is_too_large_is_an_error_or_encoded_smaller(server):
    nodes = {"images": graphs.tiny_images("5x1008x1008x3", seed=60)}
    graph = graphs.of_images(["images", 0], nodes, encode={"size": 1008, "when_too_large": "error"})
    assert "too long for the MLLM" in graphs.failure(server, graph)
    graph["encode"]["inputs"]["when_too_large"] = "lower the size"
    assert "The size was lowered from 1008 to 784 pixels" in text_of_encode(server, graph)


def test_group_that_fits_is_encoded_at_its_size(server):
    graph = graphs.easyref(encode={"when_too_large": "lower the size"})
    assert graphs.image(server, graph) == graphs.image(server, graphs.easyref())
