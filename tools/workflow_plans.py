"""Plans of the shipped workflows, from workflow_plans.yaml and the Markdown notes in workflow_notes/.

tools/workflows.py builds the JSON files from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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


class Plan(NamedTuple):
    """One workflow: its note in Markdown, and its nodes by name."""

    note: str
    nodes: Mapping[str, Node]


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


def note(name: str) -> str:
    """The Markdown note of a workflow, with the shared paragraphs in place of {new_image} and {files}."""
    shared = {part: _read(f"shared_{part}") for part in ("new_image", "files")}
    return _read(name).format(**shared) + "\n"


def _read(name: str) -> str:
    return (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()


_plans = yaml.safe_load(FILE.read_text(encoding="utf-8"))
PLANS = {
    name: Plan(note(name), workflow_nodes(_plans["common"], workflow))
    for name, workflow in _plans["workflows"].items()
}
