"""The whole path on a running server: caching, untouched models, groups, files, Cancel, progress."""

from __future__ import annotations

import json
import shutil

import comfy.utils
import pytest
import torch
from safetensors.torch import load_file

from devkit.host import golden, graphs
from devkit.host.server import ComfyServer, PromptFailed, pixels

from .conftest import HOST

NEUTRAL = {"weight": 0.0, "lora_strength": 0.0}


@pytest.fixture(scope="module")
def plain(server) -> bytes:
    """The image of the unpatched model."""
    return graphs.image(server, graphs.plain())


@pytest.fixture(scope="module")
def patched(server) -> bytes:
    """The image of the whole path with default settings."""
    return graphs.image(server, graphs.easyref())


# Caching


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    ("changes", "executed"),
    [
        ({}, set()),
        ({"seed": 8}, {"sample", "decode", "save"}),
        ({"apply": {"weight": 0.7}}, {"apply", "sample", "decode", "save"}),
        ({"encode": {"prompt": "a dog"}}, {"encode", "aggregate", "apply", "sample", "decode", "save"}),
    ],
    ids=["nothing", "seed", "weight", "prompt"],
)
def test_change_executes_the_nodes_that_depend_on_it(server, changes: dict, executed: set[str]):
    assert graphs.run(server, graphs.easyref(**changes))[0] == executed


def test_three_uncached_runs_give_the_same_pixels(server):
    assert len({graphs.uncached_image(server, graphs.easyref()) for _ in range(3)}) == 1


@pytest.mark.one_host
def test_settings_come_back_to_the_first_image():
    """Apply runs again on the same MODEL, because this cache only holds outputs of the last workflow."""
    with ComfyServer(HOST, args=["--cache-classic"]) as server:
        graphs.install_golden(server)
        first = graphs.image(server, graphs.easyref())
        for other in ({"weight": 0.3}, {"lora_strength": 0.5}, {"end_percent": 0.5}):
            assert graphs.image(server, graphs.easyref(apply=other)) != first, other
        assert graphs.run(server, graphs.easyref())[0] == {"apply", "sample", "decode", "save"}
        assert graphs.image(server, graphs.easyref()) == first


# Untouched models


def test_references_change_the_image(plain, patched):
    assert patched != plain


def test_weight_and_lora_strength_0_is_the_unpatched_model(server, plain):
    assert graphs.image(server, graphs.easyref(apply=NEUTRAL)) == plain


def test_weight_0_keeps_the_lora_and_ignores_the_references(server, plain, patched):
    graph = graphs.easyref(apply={"weight": 0.0})
    first = graphs.image(server, graph)
    assert first not in (plain, patched)
    graph["encode"]["inputs"]["prompt"] = "something else"
    assert graphs.image(server, graph) == first


def test_upstream_model_is_unchanged(server):
    """One workflow samples the patched model, then the same MODEL unpatched, from a latent of the first."""
    expected = graphs.image(server, graphs.plain(seed=11))
    graph = graphs.easyref(seed=11)
    graph["after"] = graphs.node("LatentMultiply", samples=["sample", 0], multiplier=0.0)
    branch = graphs.sampled(["tiny", 0], latent_image=["after", 0], seed=11)
    branch["decode"]["inputs"]["samples"] = ["plain sample", 0]
    branch["save"]["inputs"]["images"] = ["plain decode", 0]
    graph |= {f"plain {name}": branch[name] for name in ("sample", "decode", "save")}

    prompt_id = server.queue(graph)
    of_plain, of_patched = (pixels(png).tobytes() for png in server.images(server.wait(prompt_id), "output"))
    assert {"sample", "plain sample"} <= set(server.executed(prompt_id))
    assert of_plain == expected
    assert of_patched != expected


# Groups


@pytest.fixture(scope="module")
def three(server) -> bytes:
    """Three images of one size, each at a socket of its own."""
    names = [f"image{i}" for i in range(3)]
    images = {name: graphs.tiny_images("1x64x96x3", seed=i) for i, name in enumerate(names)}
    group = graphs.group(*([name, 0] for name in names))
    return graphs.image(server, graphs.of_images(["group", 0], {**images, "group": group}))


TWO, THIRD = graphs.tiny_images("2x64x96x3"), graphs.tiny_images("1x64x96x3", seed=2)


@pytest.mark.parametrize(
    ("nodes", "same"),
    [
        ({"group": graphs.tiny_images("3x64x96x3")}, True),
        ({"batch": graphs.tiny_images("3x64x96x3"), "group": graphs.group(["batch", 0])}, True),
        (
            {
                "two": TWO,
                "third": THIRD,
                "first group": graphs.group(["two", 0]),
                "group": graphs.group(["third", 0], group=["first group", 0]),
            },
            True,
        ),
        ({"two": TWO, "third": THIRD, "group": graphs.group(["third", 0], ["two", 0])}, False),
    ],
    ids=["batch in the encoder", "batch at a socket", "chained groups", "another order"],
)
def test_group_is_its_images_in_order(server, three, nodes: graphs.Graph, same: bool):
    assert (graphs.image(server, graphs.of_images(["group", 0], nodes)) == three) == same


SIZES = [f"1x{64 + 28 * (i % 3)}x{64 + 28 * (i % 4)}x3" for i in range(11)]


def eleven_sockets(order: list[int]) -> graphs.Graph:
    """Eleven images of different sizes; image order[i] at socket i."""
    nodes = {f"n{i}": graphs.tiny_images(size, seed=i) for i, size in enumerate(SIZES)}
    nodes["group"] = graphs.group(*([f"n{i}", 0] for i in order))
    nodes["group"]["inputs"] = dict(sorted(nodes["group"]["inputs"].items()))  # image10 is before image2
    return graphs.of_images(["group", 0], nodes)


def test_list_of_different_sizes_is_one_group_in_socket_order(server):
    listed = {"list": graphs.tiny_images(" ".join(SIZES)), "group": graphs.group(["list", 0])}
    expected = graphs.image(server, graphs.of_images(["group", 0], listed))
    assert graphs.image(server, eleven_sockets([*range(11)])) == expected
    assert graphs.image(server, eleven_sockets([0, 1, 10, *range(2, 10)])) != expected


# While it runs


def progress_of(server: ComfyServer, prompt_id: str) -> list[tuple[float, float]]:
    """(value, max) of a prompt's progress events, sampling left out."""
    events = [event.data for event in server.events_of(prompt_id) if event.type == "progress"]
    return [(data["value"], data["max"]) for data in events if data["node"] == "encode"]


def test_progress_counts_the_references(server):
    prompt_id = server.queue(graphs.easyref(encode={"prompt": "a prompt that no other test encodes"}))
    server.wait(prompt_id)
    progress = progress_of(server, prompt_id)
    assert {total for _, total in progress} == {3}
    assert progress[-1][0] == 3


def test_progress_moves_within_a_single_reference(server, pack):
    easyref = golden.load(pack)
    steps = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: steps.append((value, total)))
    try:
        golden.encode(pack, easyref, "", golden.references()[:1])
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert {total for _, total in steps} == {1}
    assert any(0 < value < 1 for value, _ in steps)


@pytest.fixture(scope="module")
def _deep(server) -> None:
    """A checkpoint of many layers, with which a large group takes many seconds."""
    golden.write_random(server.base / "models" / "easyref", layers=64, width=256)


def deep(batch: str, size: int) -> graphs.Graph:
    load = {"checkpoint": "random.safetensors", "mllm": "easyref/random-qwen2-vl"}
    nodes = {"batch": graphs.tiny_images(batch)}
    return graphs.of_images(["batch", 0], nodes, load=load, encode={"size": size})


@pytest.mark.usefixtures("_deep")
def test_cancel_stops_the_encoding_at_once_and_harms_nothing(server):
    prompt_id = server.queue(deep("24x336x336x3", size=336))
    server.wait_event(lambda event: event.type == "progress" and event.data["max"] == 24)
    server.interrupt()
    with pytest.raises(PromptFailed) as failed:
        server.wait(prompt_id)
    assert max(value for value, _ in progress_of(server, prompt_id)) < 12
    assert failed.value.kind == "execution_interrupted"
    assert "aggregate" not in server.executed(prompt_id)

    after = graphs.image(server, deep("2x84x84x3", size=84))
    assert graphs.uncached_image(server, deep("2x84x84x3", size=84)) == after


# Files


def from_file(server: ComfyServer, checkpoint: str) -> bytes:
    return graphs.image(server, graphs.easyref(load={"checkpoint": checkpoint}))


def test_deepspeed_file_gives_the_same_image(server, patched):
    state = {"module": load_file(golden.CHECKPOINT), "global_steps": 1000, "ds_version": "0.15"}
    torch.save(state, server.base / "models" / "easyref" / "mp_rank_00_model_states.pt")
    assert from_file(server, "mp_rank_00_model_states.pt") == patched


def test_file_replaced_under_the_same_name_is_loaded(server, patched):
    folder = server.base / "models" / "easyref"
    shutil.copy(golden.CHECKPOINT, folder / "replaced.safetensors")
    assert from_file(server, "replaced.safetensors") == patched
    golden.write_other_tokens(folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / "replaced.safetensors")
    assert from_file(server, "replaced.safetensors") != patched


def refused(server: ComfyServer, load: dict[str, str]) -> tuple[dict, str]:
    """The one error of a refused workflow, and the server's whole answer."""
    with pytest.raises(PromptFailed) as failed:
        server.queue(graphs.easyref(load=load))
    assert failed.value.kind == "invalid"
    (node,) = failed.value.details["node_errors"].values()
    (error,) = node["errors"]
    return error, json.dumps(failed.value.details)


@pytest.mark.parametrize(
    ("checkpoint", "first"),
    [
        ("no file in models/easyref", "No EasyRef checkpoint was found."),
        ("model.safetensors", "EasyRef checkpoint 'model.safetensors' was not found."),
    ],
)
def test_missing_checkpoint_is_reported_once(server, checkpoint: str, first: str):
    error, answer = refused(server, {"checkpoint": checkpoint})
    assert error["details"].startswith(f"checkpoint - {first} Download ")
    assert answer.count("was found") + answer.count("was not found") == 1
    assert answer.count("https://huggingface.co/zongzhuofan/EasyRef") == 1


def test_missing_mllm_folder_is_reported_once(server):
    error, _ = refused(server, {"mllm": "LLM/gone"})
    assert error["type"] == "value_not_in_list"
    assert "'LLM/gone' not in ['from the checkpoint'" in error["details"]


def test_mllm_in_a_hugging_face_cache_gives_the_same_image(server, patched):
    """Its folder is created after the server's start, as if the model had been downloaded meanwhile."""
    cache = server.base / "models" / "LLM" / "models--Qwen--Qwen2-VL-2B-Instruct"
    shutil.copytree(golden.MLLM, cache / "blobs")
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    name = "LLM/Qwen/Qwen2-VL-2B-Instruct (Hugging Face cache)"
    options = server.object_info()["EasyRefLoader"]["input"]["required"]["mllm"][1]["options"]
    assert name in options
    assert graphs.uncached_image(server, graphs.easyref(load={"mllm": name})) == patched


def test_clients_other_than_the_frontend_get_no_texts(server) -> None:
    """Such as comfy-api-simplified, which takes every binary message for an image."""
    graph = graphs.easyref()
    graph["encode"]["inputs"]["prompt"] = "a prompt of its own"
    before = len(server.events)
    history = server.run(graph)
    assert history["outputs"]["encode"]["text"]
    assert [event.type for event in server.events[before:] if event.type == "binary"] == []
