"""The inspection nodes on a running server: previews, the cache, and lists of settings."""

from __future__ import annotations

import numpy as np
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


def images_of(server: ComfyServer, history: dict, name: str) -> list[np.ndarray]:
    """Pixels of the images that a node showed or saved, in order."""
    return [pixels(png) for png in server.images({"outputs": {name: history["outputs"][name]}})]


def inspected(**where: str) -> graphs.Graph:
    """The whole path with every inspection node."""
    graph = graphs.easyref()
    graph["sample"]["inputs"]["model"] = ["record", 0]
    texts = {"prompt": golden.SETTINGS["prompt"], "instruction": golden.SETTINGS["instruction"]}
    recorded = {"record": ["record", 1], "sampled": ["decode", 0], "side": "prompt"}
    compared = {"images": ["decode", 0], "group": ["group", 0], "crop": "center"}
    linked = {"easyref": ["load", 0], "group": ["group", 0]}
    return graph | {
        "record": node("EasyRefRecord", model=["apply", 0]),
        "clip": node("TinyClipVision"),
        "attention": node("EasyRefReferenceAttention", context=["encode", 0], token=-1, **linked),
        "influence": node("EasyRefReferenceInfluence", size=golden.SIZE, **texts, **linked),
        "where": node("EasyRefWhereItActs", **{**recorded, **where}),
        "close": node("EasyRefConsistency", clip_vision=["clip", 0], **compared),
        "read": node("PreviewAny", source=["attention", 2]),
        "odd": node("PreviewAny", source=["influence", 2]),
        "said": node("PreviewAny", source=["where", 3]),
        "best": node("PreviewAny", source=["close", 3]),
        "masks": node("MaskToImage", mask=["attention", 1]),
        "maps": node("PreviewImage", images=["masks", 0]),
    }


@pytest.fixture(scope="module")
def history(server) -> dict:
    return server.run(inspected())


@pytest.mark.parametrize("name", ["attention", "influence", "where", "close"])
def test_node_shows_its_chart(server, history, name: str) -> None:
    (chart,) = images_of(server, history, name)
    assert min(chart.shape[:2]) > 100


def test_reports_and_numbers_come_out(history) -> None:
    assert "all references" in text_of(history, "read")
    assert text_of(history, "odd") == "-1"
    assert "2 steps" in text_of(history, "said")
    assert text_of(history, "best") == "0"


def test_maps_have_the_size_of_each_reference(server, history) -> None:
    sizes = [tuple(reference.shape[1:3]) for reference in golden.references()]
    assert [image.shape[:2] for image in images_of(server, history, "maps")] == sizes


def test_recording_does_not_change_the_image(server, history) -> None:
    (image,) = images_of(server, history, "save")
    assert image.tobytes() == graphs.image(server, graphs.easyref())


def test_record_outlives_the_cached_sampler(server, history) -> None:
    server.run(inspected())  # the host caches the outputs of the last workflow
    prompt_id = server.queue(inspected(side="negative"))
    again = server.wait(prompt_id)
    assert set(server.executed(prompt_id)) == {"where", "said"}
    assert "2 steps" in text_of(again, "said")
    assert text_of(again, "said") != text_of(history, "said")


def test_record_is_of_the_new_sampling(server) -> None:
    server.run(inspected())
    graph = inspected()
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
    (sheet,) = images_of(server, history, "sheet")
    assert sheet.shape[0] > 2 * 128
    assert sheet.shape[1] > 3 * 128
    images = images_of(server, history, "save")
    assert len(images) == 6
    single = graphs.easyref(apply={"weight": 0.5, "end_percent": 1.0})
    assert images[4].tobytes() == graphs.image(server, single)


def test_invalid_list_of_weights_is_refused(server) -> None:
    graph = {"pairs": node("EasyRefWeightSheet", weights="0.5; 4", end_percents="1")}
    graph["show"] = node("PreviewAny", source=["pairs", 0])
    assert "weights has '4' where a number is wanted, from -1 to 3" in graphs.failure(server, graph)
