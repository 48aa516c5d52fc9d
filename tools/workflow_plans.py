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
SIZED = ("EmptyLatentImage", "SolidMask")

Fields = dict[str, Any]  # of a node, as in the YAML file


@dataclasses.dataclass(frozen=True)
class Node:
    """One node; see workflow_plans.yaml."""

    type: str
    column: int
    row: int | None = 0
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a list is a link [node, output]
    title: str | None = None
    group: str | None = None  # title of the frame around it
    height: int = 0  # pixels; 0: the node's default
    above: int = 0  # pixels left free above it, for wires
    order: int = 0  # among the nodes of its cell
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

    @property
    def is_tiny(self) -> bool:
        """True if it needs no download."""
        return any(node.type == "EasyRefDemo" for node in self.nodes.values())


class Blueprint(NamedTuple):
    """One subgraph that the frontend's search offers as a node.

    inputs: [node, input] by their names outside; outputs: [node, output index].
    """

    description: str
    search_aliases: Sequence[str]
    nodes: Mapping[str, Node]
    inputs: Mapping[str, Sequence[Any]]
    outputs: Mapping[str, Sequence[Any]]


# The nodes of a workflow


def references(groups: Mapping[str, tuple[str, int]]) -> dict[str, Fields]:
    """The Load Image nodes of each group, and the groups that they form."""
    nodes: dict[str, Fields] = {}
    for group, (image, count) in groups.items():
        names = [f"{image}{i}" for i in range(count)]
        for i, name in enumerate(names, start=1):
            place = {"column": 0, "row": None, "group": "References", "height": 310}
            title = f"{image.capitalize()} {i}"
            nodes[name] = {"type": "LoadImage", "title": title, "inputs": {"image": EXAMPLE}, **place}
        links = {f"images.image{i}": [name, 0] for i, name in enumerate(names)}
        place = {"column": 1, "row": 1, "group": "EasyRef", "height": 300}
        nodes[group] = {"type": "EasyRefGroup", "inputs": links, **place}
    return nodes


def workflow_fields(common: Mapping[str, Fields], workflow: Fields) -> dict[str, Fields]:
    """The groups of a workflow, then the common nodes with its changes, then its further nodes."""
    nodes = {name: fields for name, fields in common.items() if name not in workflow.get("without", ())}
    changes = {"prompt": {"inputs": {"value": workflow["prompt"]}}, **workflow.get("nodes", {})}
    return _changed(references(workflow["groups"]) | nodes, changes)


def tiny_fields(plans: Fields, name: str, full: Mapping[str, Fields]) -> dict[str, Fields]:
    """The nodes of a workflow on the tiny demo model; "tiny" of the plans says what stands for what.

    full: the nodes on SDXL.
    """
    workflow, tiny, demo = plans["workflows"][name], plans["tiny"], plans["demo"][name]
    changes = workflow["tiny"]
    links = {(name, output): to for name, outputs in tiny["links"].items() for output, to in outputs.items()}
    made: dict[str, Fields] = {}
    for i, group in enumerate(workflow["groups"]):
        model = group.replace("group", "demo")
        place = {"row": 1, "group": "Prompt and models", "height": 430}
        title = _title(model.replace("demo", "examples")) if i else None
        made[model] = {"type": "EasyRefDemo", "column": 1, "title": title, "inputs": demo[group], **place}
        links[group, 0] = [model, tiny["references"]]

    loaded = references(workflow["groups"])
    left_out = {*loaded, *tiny["without"], *changes.get("without", ())}
    kept = {key: _scaled(fields, tiny["scale"]) for key, fields in full.items() if key not in left_out}
    shared = {key: fields for key, fields in tiny["nodes"].items() if key not in left_out}
    nodes = _changed(_changed(made | kept, shared), changes.get("nodes", {}))
    for group in demo.keys() - workflow["groups"].keys():
        nodes[f"demo_{group}"] = {**nodes[f"demo_{group}"], "inputs": demo[group]}
    values = tiny["values"][changes.get("world", "shapes")]
    for key, fields in nodes.items():
        inputs = fields.get("inputs", {}) | values.get(fields["type"], {})
        linked = {
            slot: links.get(tuple(value), value) if isinstance(value, list) else value
            for slot, value in inputs.items()
        }
        nodes[key] = fields | {"inputs": linked, "model": None}
    return nodes


def _changed(nodes: Mapping[str, Fields], changes: Mapping[str, Fields]) -> dict[str, Fields]:
    """Nodes with changed fields and further nodes: inputs are merged, other fields are replaced."""
    changed = dict(nodes)
    for name, fields in changes.items():
        before = changed.get(name, {})
        changed[name] = before | fields | {"inputs": before.get("inputs", {}) | fields.get("inputs", {})}
    return changed


def _scaled(fields: Fields, scale: int) -> Fields:
    """A node whose latent or mask has sides that are `scale` times smaller."""
    if fields["type"] not in SIZED:
        return fields
    sides = {side: fields["inputs"][side] // scale for side in ("width", "height")}
    return fields | {"inputs": fields["inputs"] | sides}


def _nodes(fields: Mapping[str, Fields]) -> dict[str, Node]:
    """The nodes, with a title of its own for each of a type that several have."""
    types = [node["type"] for node in fields.values()]
    return {
        name: Node(**{"title": _title(name) if types.count(node["type"]) > 1 else None} | _named(node))
        for name, node in fields.items()
    }


def _named(node: Fields) -> Fields:
    return node if node.get("title") else {key: value for key, value in node.items() if key != "title"}


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def blueprint(common: Mapping[str, Fields], fields: Fields) -> Blueprint:
    """The blueprint of common nodes with its changes, without their links to nodes that it does not have."""

    def node(name: str, changes: Fields) -> Node:
        own = common[name] | changes
        inputs = {
            key: value
            for key, value in own.get("inputs", {}).items()
            if not isinstance(value, list) or value[0] in fields["nodes"]
        }
        return Node(**own | {"inputs": inputs, "group": None})

    nodes = {name: node(name, changes) for name, changes in fields["nodes"].items()}
    return Blueprint(**fields | {"nodes": nodes})


# Notes


def note(name: str, tiny: str | None) -> str:
    """The Markdown note of a workflow, with the shared paragraphs in place of their names.

    tiny: name of its tiny variant.
    """
    parts = {part: _read(f"shared_{part}") for part in ("new_image", "files")}
    if tiny:
        parts["files"] += "\n\n" + _read("shared_without_files").format(tiny=tiny)
    return _read(name).format(**parts) + "\n"


def tiny_note(name: str, full: str) -> str:
    """The note of a tiny variant: its own, or that of the full workflow with a paragraph about the model."""
    own = (NOTES / f"{name}.md").is_file()
    parts = {part: _read(f"shared_{part}") for part in ("new_image", "words")}
    parts["files"] = _read("shared_tiny").format(full=full, words=parts["words"])
    return _read(name if own else full).format(**parts) + "\n"


def _read(name: str) -> str:
    return (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()


# The plans of the file


def _plans_of(plans: Fields, name: str, workflow: Fields) -> dict[str, Plan]:
    """The plan of a workflow, and that of its tiny variant."""
    full = workflow_fields(plans["common"], workflow)
    tiny_name, changes = VARIANTS.get(name), workflow.get("tiny")
    made = {name: Plan(note(name, tiny_name), _nodes(full), _app(workflow))}
    if tiny_name:
        fields = tiny_fields(plans, name, full)
        made[tiny_name] = Plan(tiny_note(tiny_name, name), _nodes(fields), _app(changes))
    return made


def _app(fields: Fields) -> App | None:
    return App(**fields["app"]) if "app" in fields else None


_file = yaml.safe_load(FILE.read_text(encoding="utf-8"))
# names of the tiny variants, by the names of the full workflows
VARIANTS = {
    name: fields["tiny"].get("name", f"{name}_tiny")
    for name, fields in _file["workflows"].items()
    if "tiny" in fields
}
BLUEPRINTS = {name: blueprint(_file["common"], fields) for name, fields in _file["blueprints"].items()}
PLANS = {
    name: plan
    for workflow, fields in _file["workflows"].items()
    for name, plan in _plans_of(_file, workflow, fields).items()
}
