"""The nodes that show what EasyRef does, on a running server: pictures on the nodes, the cache, lists of settings."""

from __future__ import annotations

import pytest

from devkit.host import golden, graphs
from devkit.host.graphs import node
from devkit.host.server import ComfyServer, pixels


@pytest.fixture(scope="module", autouse=True)
def _golden(server) -> None:
    graphs.install_golden(server)


def text_of(history: dict, name: str) -> str:
    (text,) = history["outputs"][name]["text"]
    return text


def shown(server: ComfyServer, history: dict, name: str) -> tuple[int, int]:
    """Height and width of the one picture on a node."""
    files = history["outputs"][name]["images"]
    assert len(files) == 1
    (png,) = server.images({"outputs": {name: {"images": files}}})
    return pixels(png).shape[:2]


def looked_at(**where: str) -> graphs.Graph:
    """The whole path with every node that looks at it, none of whose pictures goes anywhere."""
    graph = graphs.easyref()
    graph["sample"]["inputs"]["model"] = ["record", 0]
    texts = {"prompt": golden.SETTINGS["prompt"], "instruction": golden.SETTINGS["instruction"]}
    linked = {"easyref": ["load", 0], "group": ["group", 0]}
    # fmt: skip
    return graph | {
        "record": node("EasyRefRecord", model=["apply", 0]),
        "clip": node("TinyClipVision"),
        "attention": node("EasyRefReferenceAttention", context=["encode", 0], token=-1, **linked),
        "influence": node("EasyRefReferenceInfluence", size=golden.SIZE, **texts, **linked),
        "where": node(
            "EasyRefWhereItActs",
            **{"record": ["record", 1], "sampled": ["decode", 0], "side": "prompt"} | where,
        ),
        "close": node(
            "EasyRefConsistency",
            clip_vision=["clip", 0],
            images=["decode", 0],
            group=["group", 0],
            crop="center",
        ),
        "read": node("PreviewAny", source=["attention", 2]),
        "odd": node("PreviewAny", source=["influence", 2]),
        "said": node("PreviewAny", source=["where", 3]),
        "best": node("PreviewAny", source=["close", 3]),
        "masks": node("MaskToImage", mask=["attention", 1]),
        "maps": node("PreviewImage", images=["masks", 0]),
    }


@pytest.fixture(scope="module")
def history(server) -> dict:
    return server.run(looked_at())


@pytest.mark.parametrize("name", ["attention", "influence", "where", "close"])
def test_node_shows_its_picture(server, history, name: str) -> None:
    assert min(shown(server, history, name)) > 100


def test_reports_and_numbers_come_out(history) -> None:
    assert "all references" in text_of(history, "read")
    assert text_of(history, "odd") == "-1"
    assert "2 steps" in text_of(history, "said")
    assert text_of(history, "best") == "0"


def test_maps_are_a_list_of_each_references_size(server, history) -> None:
    files = [
        server.images({"outputs": {"x": {"images": [f]}}})[0] for f in history["outputs"]["maps"]["images"]
    ]
    assert [pixels(png).shape[:2] for png in files] == [tuple(r.shape[1:3]) for r in golden.references()]


def test_recording_leaves_the_picture_as_it_is(server, history) -> None:
    (png,) = server.images({"outputs": {"save": history["outputs"]["save"]}})
    assert pixels(png).tobytes() == graphs.picture(server, graphs.easyref())


def test_record_outlives_the_cached_sampler(server, history) -> None:
    server.run(looked_at())  # the host keeps what the last workflow used
    prompt_id = server.queue(looked_at(side="negative"))
    again = server.wait(prompt_id)
    assert set(server.executed(prompt_id)) == {"where", "said"}
    assert "2 steps" in text_of(again, "said")
    assert text_of(again, "said") != text_of(history, "said")


def test_record_is_of_the_new_sampling(server) -> None:
    server.run(looked_at())
    graph = looked_at()
    graph["sample"]["inputs"] |= {"seed": 8, "steps": 3}
    prompt_id = server.queue(graph)
    again = server.wait(prompt_id)
    assert "record" not in server.executed(prompt_id)
    assert "3 steps" in text_of(again, "said")


def test_sheet_runs_every_pair(server) -> None:
    graph = graphs.easyref(apply={"weight": ["pairs", 0], "end_percent": ["pairs", 1]})
    graph["pairs"] = node("EasyRefWeightSheet", weights="0, 0.5, 1", end_percents="0.5, 1")
    links = {"weight": ["pairs", 0], "end_percent": ["pairs", 1]}
    graph["sheet"] = node("EasyRefSheet", images=["decode", 0], cell=128, **links)
    history = server.run(graph)
    height, width = shown(server, history, "sheet")
    assert height > 2 * 128
    assert width > 3 * 128
    pictures = [
        pixels(png).tobytes() for png in server.images({"outputs": {"save": history["outputs"]["save"]}})
    ]
    assert len(pictures) == 6
    one = graphs.easyref(apply={"weight": 0.5, "end_percent": 1.0})
    assert pictures[4] == graphs.picture(server, one)


def test_list_of_weights_that_cannot_be_read_says_so(server) -> None:
    graph = {"pairs": node("EasyRefWeightSheet", weights="0.5; 4", end_percents="1")}
    graph["show"] = node("PreviewAny", source=["pairs", 0])
    assert "weights has '4' where a number is wanted, from -1 to 3" in graphs.failure(server, graph)
