"""Nodes load replaced files again, and only those, for typed and for linked names."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from devkit.host import golden, graphs
from devkit.host.graphs import Graph, node
from devkit.host.server import ComfyServer

TEXT, NUMBER, CHOICE = "PrimitiveString", "PrimitiveInt", "TinyCombo"


def replace(file: Path) -> None:
    """The same content in another file of the same name."""
    replacement = file.with_suffix(".copy")
    shutil.copy(file, replacement)
    replacement.replace(file)


def linked(kind: str, output: int, **values: tuple[str, Any]) -> Graph:
    """A node called "read" whose inputs come from nodes of these types."""
    sources = {key: node(source, value=value) for key, (source, value) in values.items()}
    read = {key: (kind, [key, 0]) for key, (kind, _) in values.items()}
    return {**sources, **typed(kind, output, **read)}


def typed(kind: str, output: int, **values: tuple[str, Any]) -> Graph:
    read = node(kind, **{key: value for key, (_, value) in values.items()})
    return {"read": read, "show": node("PreviewAny", source=["read", output])}


FOLDER = ("EasyRefGroupFromFolder", 1)
IN_FOLDER = {"folder": (TEXT, "changing"), "limit": (NUMBER, 2), "start": (NUMBER, 0)}
CHECKPOINT = {
    "checkpoint": (CHOICE, "easyref.safetensors"),
    "mllm": (CHOICE, "easyref/golden-qwen2-vl"),
    "precision": (CHOICE, "auto"),
    "last_layer_attention": (CHOICE, "from the checkpoint"),
}
SAVED = {"file": (CHOICE, "changes_00001_.safetensors")}
READERS = {
    "folder": (*FOLDER, IN_FOLDER, "input/changing/1.png"),
    "checkpoint": ("EasyRefLoader", 0, CHECKPOINT, "models/easyref/easyref.safetensors"),
    "mllm": ("EasyRefLoader", 0, CHECKPOINT, "models/easyref/golden-qwen2-vl/config.json"),
    "tokens": ("EasyRefLoadTokens", 1, SAVED, "output/easyref/changes_00001_.safetensors"),
}


@pytest.fixture(scope="module", autouse=True)
def files(server: ComfyServer) -> None:
    """Two folders of images, and the golden tokens."""
    for folder in ("changing", "places"):
        (server.base / "input" / folder).mkdir()
        for number in range(3):
            shutil.copy(server.base / "input" / "0.png", server.base / "input" / folder / f"{number}.png")
    save = node("EasyRefSaveTokens", tokens=["aggregate", 0], filename_prefix="changes")
    server.run({**graphs.tokens(), "save tokens": save})


def executed(server: ComfyServer, graph: Graph) -> set[str]:
    return graphs.run(server, graph)[0]


@pytest.mark.parametrize("inputs", [linked, typed])
@pytest.mark.parametrize("reader", READERS)
def test_replaced_file_is_loaded_again_once(server, reader: str, inputs):
    kind, output, values, file = READERS[reader]
    graph = inputs(kind, output, **values)
    executed(server, graph)
    for _ in range(2):
        assert executed(server, graph) == set()
        replace(server.base / file)
        assert executed(server, graph) == {"read", "show"}
    assert executed(server, graph) == set()


def test_other_files_run_nothing_again(server):
    """Files that nothing read, and files of another node of the same type."""
    graph = linked(*FOLDER, **IN_FOLDER)
    graph["typed"] = node(FOLDER[0], folder="places", limit=1, start=0)
    graph["show typed"] = node("PreviewAny", source=["typed", 1])
    executed(server, graph)
    replace(server.base / "input" / "changing" / "2.png")  # behind the limit
    (server.base / "input" / "changing" / "notes.txt").touch()
    (server.base / "input" / "new").mkdir()
    assert executed(server, graph) == set()
    replace(server.base / "input" / "places" / "0.png")
    assert executed(server, graph) == {"typed", "show typed"}


def test_value_computed_while_it_runs(server):
    """The name of the folder is not a constant of the graph."""
    graph = linked(*FOLDER, **IN_FOLDER)
    graph["folder"] = node("StringConcatenate", string_a="chang", string_b="ing", delimiter="")
    executed(server, graph)
    assert executed(server, graph) == set()
    replace(server.base / "input" / "changing" / "0.png")
    assert executed(server, graph) == {"read", "show"}


def test_replaced_file_reruns_an_equal_node_of_another_id(server):
    """The host's cache ignores node ids, so an equal node reuses the outputs of this one."""
    graph = linked(*FOLDER, **{**IN_FOLDER, "limit": (NUMBER, 1)})
    executed(server, graph)
    renamed = {{"read": "other"}.get(name, name): entry for name, entry in graph.items()}
    renamed["show"] = node("PreviewAny", source=["other", 1])
    assert executed(server, renamed) == set()
    replace(server.base / "input" / "changing" / "0.png")
    assert executed(server, renamed) == {"other", "show"}


@pytest.fixture
def changes(pack: ModuleType) -> tuple[Any, dict[str, str]]:
    """FileChanges over files in a dictionary: {name: state}."""
    states = {"a": "1", "b": "1"}
    return golden.part(pack, "nodes.host.file_changes").FileChanges(states.__getitem__), states


def test_fingerprint_is_the_state_of_typed_files_or_changes_with_the_recorded_ones(changes):
    record, states = changes
    assert record.fingerprint("a") == "1"
    first = record.fingerprint(None)
    record.record("a")
    states["b"] = "2"
    assert record.fingerprint(None) == first
    states["a"] = "2"
    second = record.fingerprint(None)
    assert first != second == record.fingerprint(None)


def test_file_that_changes_between_two_nodes_of_one_prompt_changes_the_next_fingerprint(changes):
    record, states = changes
    first = record.fingerprint(None)
    record.record("a")
    states["a"] = "2"
    record.record("a")
    assert record.fingerprint(None) != first


def test_dropped_record_counts_as_a_change(pack, changes):
    record, states = changes
    most = golden.part(pack, "nodes.host.file_changes").MAX_RECORDS
    first = record.fingerprint(None)
    for number in range(most):
        states[f"{number}"] = "1"
        record.record(f"{number}")
    assert record.fingerprint(None) == first
    record.record("a")
    assert record.fingerprint(None) != first


def test_another_process_has_other_fingerprints(pack, monkeypatch):
    """A cache on disk outlives the process, but the count of changes restarts at zero."""
    module = golden.part(pack, "nodes.host.file_changes")
    first = module.FileChanges(str).fingerprint(None)
    monkeypatch.setattr(module, "PROCESS", "another")
    assert module.FileChanges(str).fingerprint(None) != first
