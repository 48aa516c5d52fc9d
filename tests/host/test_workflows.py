"""Every shipped workflow runs in the host: on the tiny demo model, or with the tests' tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from devkit.host import graphs
from devkit.hosts import ROOT
from easyref_core.tiny.worlds import WORLDS
from tools.workflow_plans import BLUEPRINTS, PLANS, Node

from . import tiny_workflow

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module", autouse=True)
def files(server):
    tiny_workflow.install(server)


def is_variant(file: Path) -> bool:
    """True for the tiny variant of another workflow, which has the same nodes."""
    return file.stem != "try_it_now" and tiny_workflow.is_tiny(graphs.from_file(file))


@pytest.mark.parametrize(
    "workflow",
    [
        pytest.param(file, id=file.stem, marks=[pytest.mark.one_host] if is_variant(file) else [])
        for file in WORKFLOWS
    ],
)
def test_workflow_gives_images(server, workflow):
    graph = graphs.from_file(workflow)
    if not tiny_workflow.is_tiny(graph):
        graph = tiny_workflow.tiny(graph)
    history = server.run(graph)
    assert server.images(history)


@pytest.mark.parametrize("name", [name for name in PLANS if PLANS[name].is_tiny])
def test_tiny_variant_needs_no_file_of_the_user(name):
    graph = graphs.from_file(ROOT / "workflows" / f"{name}.json")
    types = {node["class_type"] for node in graph.values()}
    loaders = {kind for kind in types if "Loader" in kind or kind.startswith("Load")}
    assert loaders == {"EasyRefLoader"}
    (load,) = (node["inputs"] for node in graph.values() if node["class_type"] == "EasyRefLoader")
    worlds = {node["inputs"]["world"] for node in graph.values() if node["class_type"] == "EasyRefDemo"}
    assert [load["checkpoint"]] == [WORLDS[world].easyref for world in worlds]


@pytest.mark.parametrize("name", PLANS)
def test_workflow_matches_its_plan_and_the_defaults(server, name):
    schemas = server.object_info()
    saved = graphs.from_file(ROOT / "workflows" / f"{name}.json")
    planned = PLANS[name].nodes.values()
    plans = [plan for plan in planned if plan.type not in BLUEPRINTS]
    plans += [node for plan in planned if plan.type in BLUEPRINTS for node in inside(plan)]
    for number, plan in zip(sorted(saved, key=lambda number: ":" in number), plans, strict=True):
        node = saved[number]
        assert node["class_type"] == plan.type
        sections = schemas[plan.type]["input"]
        inputs = sections["required"] | sections.get("optional", {})
        for key, value in node["inputs"].items():
            if isinstance(plan.inputs.get(key), list):
                assert isinstance(value, list), key
            elif key in plan.inputs:
                assert value == plan.inputs[key], key
            elif key in inputs and (default := default_of(*inputs[key])) is not None:
                assert value == default, f"{plan.type}.{key}"


def inside(plan: Node) -> list[Node]:
    """The nodes of a blueprint with the inputs that its node has outside."""
    blueprint = BLUEPRINTS[plan.type]
    given = {tuple(blueprint.inputs[name]): value for name, value in plan.inputs.items()}
    return [
        dataclasses.replace(
            node, inputs={**node.inputs, **{key: value for (of, key), value in given.items() if of == name}}
        )
        for name, node in blueprint.nodes.items()
    ]


def default_of(kind, options=None):
    """Return the default value of an input; None if it depends on the host's files."""
    return (options or {}).get("default", "" if kind == "STRING" else None)
