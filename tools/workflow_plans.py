"""Plans of the shipped workflows and blueprints, from workflow_plans.yaml and workflow_notes/.

tools/workflows.py builds the JSON files from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FILE = Path(__file__).with_suffix(".yaml")
NOTES = Path(__file__).with_name("workflow_notes")
EXAMPLE = "example.png"  # in the host's input folder


@dataclasses.dataclass(frozen=True)
class Node:
    """One node; see workflow_plans.yaml."""

    type: str
    column: int
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a list is a link [node, output]
    title: str | None = None
    height: int = 0  # pixels; 0: the node's default
    model: list[str] | None = None  # file, URL, folder of models/


class App(NamedTuple):
    """A workflow opened as an app: widgets [node, widget, label], and the nodes whose images it shows."""

    inputs: Sequence[Sequence[str]]
    outputs: Sequence[str]


class Plan(NamedTuple):
    """One workflow: its note in Markdown, and its nodes by name."""

    note: str
    nodes: Mapping[str, Node]
    app: App | None = None


class Blueprint(NamedTuple):
    """One subgraph that the frontend's search offers as a node.

    inputs: [node, input] by their names outside; outputs: [node, output index].
    """

    description: str
    search_aliases: Sequence[str]
    nodes: Mapping[str, Node]
    inputs: Mapping[str, Sequence[Any]]
    outputs: Mapping[str, Sequence[Any]]


def references(group: str, image: str, count: int) -> dict[str, Node]:
    """`count` Load Image nodes and the group that they form."""
    names = [f"{image}{i}" for i in range(count)]
    images = {
        name: Node("LoadImage", 0, {"image": EXAMPLE}, f"{image.capitalize()} {i}", height=310)
        for i, name in enumerate(names, start=1)
    }
    links = {f"images.image{i}": [name, 0] for i, name in enumerate(names)}
    return images | {group: Node("EasyRefGroup", 1, links, group.replace("_", " ").capitalize())}


def workflow_nodes(common: Mapping[str, Any], workflow: Mapping[str, Any]) -> dict[str, Node]:
    """The groups of a workflow, then the common nodes with its changes, then its further nodes."""
    nodes = {name: fields for name, fields in common.items() if name not in workflow.get("without", ())}
    for name, changes in {"prompt": {"inputs": {"value": workflow["prompt"]}}, **workflow["nodes"]}.items():
        fields = nodes.get(name, {})
        nodes[name] = fields | changes | {"inputs": fields.get("inputs", {}) | changes.get("inputs", {})}
    groups = [references(group, *images) for group, images in workflow["groups"].items()]
    built = {name: Node(**fields) for name, fields in nodes.items()}
    return {name: node for part in (*groups, built) for name, node in part.items()}


def blueprint(common: Mapping[str, Any], fields: Mapping[str, Any]) -> Blueprint:
    """The blueprint of common nodes with its changes, without their links to nodes that it does not have."""

    def node(name: str, changes: Mapping[str, Any]) -> Node:
        own = common[name] | changes
        inputs = {
            key: value
            for key, value in own.get("inputs", {}).items()
            if not isinstance(value, list) or value[0] in fields["nodes"]
        }
        return Node(**own | {"inputs": inputs})

    nodes = {name: node(name, changes) for name, changes in fields["nodes"].items()}
    return Blueprint(**fields | {"nodes": nodes})


def note(name: str) -> str:
    """The Markdown note of a workflow, with the shared paragraphs in place of {new_image} and {files}."""
    shared = {part: _read(f"shared_{part}") for part in ("new_image", "files")}
    return _read(name).format(**shared) + "\n"


def _read(name: str) -> str:
    return (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()


_plans = yaml.safe_load(FILE.read_text(encoding="utf-8"))
BLUEPRINTS = {name: blueprint(_plans["common"], fields) for name, fields in _plans["blueprints"].items()}
PLANS = {
    name: Plan(
        note(name),
        workflow_nodes(_plans["common"], workflow),
        App(**workflow["app"]) if "app" in workflow else None,
    )
    for name, workflow in _plans["workflows"].items()
}
