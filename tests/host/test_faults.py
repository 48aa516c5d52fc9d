"""A running server after interruptions, out of memory, and replaced files, and with two clients."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest

from devkit.host import golden, graphs
from devkit.host.faults import (
    AGGREGATION,
    DECODER,
    KEY_VALUES,
    LOADING,
    MEMORY,
    PREPROCESSING,
    SAMPLING,
    VISION,
    Stage,
    check_interruption,
    empty_caches,
    run_with_fault,
)
from devkit.host.graphs import node

pytestmark = pytest.mark.one_host


@pytest.fixture(scope="module")
def undisturbed(server) -> bytes:
    """The image of the whole path on a server without faults."""
    return graphs.uncached_image(server, graphs.easyref())


@pytest.mark.parametrize(
    ("stage", "call"),
    [
        (DECODER, 2),
        (KEY_VALUES, 1),
        (SAMPLING, 1),
        *(
            pytest.param(stage, 1, marks=pytest.mark.thorough)
            for stage in (PREPROCESSING, VISION, AGGREGATION)
        ),
    ],
)
def test_interruption_leaves_nothing_behind(server, undisturbed, stage: Stage, call: int) -> None:
    assert check_interruption(server, graphs.easyref(), undisturbed, stage, call)


@pytest.mark.parametrize(
    "stage",
    [
        LOADING,
        SAMPLING,
        *(pytest.param(stage, marks=pytest.mark.thorough) for stage in (AGGREGATION, KEY_VALUES)),
    ],
)
def test_out_of_memory_is_one_error_and_leaves_nothing_behind(server, undisturbed, stage: Stage) -> None:
    empty_caches(server)
    error = run_with_fault(server, graphs.easyref(), stage, 1, MEMORY)
    assert error.kind == "execution_error"
    assert error.details["node_id"] == stage.node
    assert error.details["exception_type"].endswith("OutOfMemoryError")
    assert "tried to allocate 20.00 GiB" in error.details["exception_message"]
    assert graphs.image(server, graphs.easyref()) == undisturbed


LOADED = {"checkpoint": "faults.safetensors"}


@pytest.fixture
def checkpoint(server):
    """A copy of the golden checkpoint, loaded and memory-mapped by the server."""
    path = server.base / "models" / "easyref" / LOADED["checkpoint"]
    shutil.copy(golden.CHECKPOINT, path)
    graphs.image(server, graphs.easyref(load=LOADED))
    yield path
    path.unlink(missing_ok=True)


def replace_content(path) -> None:
    """Replace the file by another checkpoint of the same size and modification time."""
    new, old = path.with_name("new"), path.stat()
    golden.write_other_tokens(new)
    os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert new.stat().st_size == old.st_size
    new.replace(path)


def test_replaced_checkpoint_of_the_same_size_and_time_is_noticed(server, undisturbed, checkpoint) -> None:
    keep = {"keep": node("EasyRefSaveTokens", tokens=["aggregate", 0], filename_prefix="faults/old")}
    history = server.run({**graphs.easyref(load=LOADED), **keep})
    (saved,) = history["outputs"]["keep"]["easyref_tokens"]
    replace_content(checkpoint)
    replaced = graphs.image(server, graphs.easyref(load=LOADED))
    assert replaced != undisturbed
    assert graphs.uncached_image(server, graphs.easyref(load=LOADED)) == replaced

    old_tokens = graphs.easyref({"tokens": ["tokens", 0]}, load=LOADED)
    old_tokens["tokens"] = node("EasyRefLoadTokens", file=f"faults/{saved['filename']}")
    assert "was made by another EasyRef checkpoint" in graphs.failure(server, old_tokens)


def test_damaged_checkpoint_is_an_error_until_it_is_restored(server, undisturbed, checkpoint) -> None:
    graph = graphs.easyref(load=LOADED)
    content = golden.CHECKPOINT.read_bytes()
    for damage in (lambda: os.truncate(checkpoint, 1000), lambda: checkpoint.write_bytes(content[:-1000])):
        damage()  # in place, because the loaded model maps this file
        assert "is not a complete safetensors file" in graphs.failure(server, graph)
    checkpoint.unlink()
    assert "was not found" in graphs.failure(server, graph)
    checkpoint.write_bytes(content)
    assert graphs.image(server, graph) == undisturbed


def test_partial_file_of_a_killed_save_is_not_offered(server) -> None:
    folder = server.base / "output" / "easyref" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"killed_00001_.safetensors").hexdigest()[:16]
    partial = folder / f".{digest}.partial"  # its name in atomic_write.py
    partial.write_bytes(b"half")
    listed = server.object_info()["EasyRefLoadTokens"]["input"]["required"]["file"][1]["options"]
    assert not [name for name in listed if "killed" in name]
    keep = node("EasyRefSaveTokens", tokens=["aggregate", 0], filename_prefix="faults/killed")
    server.run({**graphs.easyref(), "keep": keep})
    assert not partial.exists()
    assert (folder / "killed_00001_.safetensors").is_file()


def test_two_clients_get_the_results_that_each_gets_alone(server) -> None:
    mine = [graphs.easyref(encode={"prompt": f"mine {i}"}) for i in range(2)]
    other = graphs.easyref(encode={"prompt": "other"}, seed=3)
    other["group"] = graphs.group(["image2", 0], ["image0", 0])
    theirs = [{**other, "sample": node("KSampler", **other["sample"]["inputs"] | {"cfg": c})} for c in (1, 5)]
    alone = [graphs.uncached_image(server, graph) for graph in (*mine, *theirs)]
    empty_caches(server)
    second = server.another_client()
    queued = []
    for ours, others in zip(mine, theirs, strict=True):
        queued += [(server, server.queue(ours)), (second, second.queue(others))]
    together = [graphs.image_of(client, prompt_id) for client, prompt_id in queued]
    assert [together[i] for i in (0, 2, 1, 3)] == alone
    for client, prompt_id in queued:
        other_client = second if client is server else server
        assert client.executed(prompt_id)
        assert not other_client.executed(prompt_id)
