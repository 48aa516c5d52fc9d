"""Digests of what pictures were made from, recorded when they are made, so that a test finds stale ones.

The pictures are thumbnails of workflows, on help pages the nodes and the results of workflows' runs, and the
README's screenshot. tools/thumbnails.py, node_pictures.py and screenshots.py call `record`;
tests/core/test_pictures.py compares `digest` with the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from devkit.hosts import ROOT

RECORDS = ROOT / "tools" / "pictures.json"
SCHEMAS = ROOT / "tests" / "host" / "object_info.json"
WORKFLOWS, HELP = ROOT / "workflows", ROOT / "web" / "docs" / "pictures"
SCREENSHOT = ROOT / "docs" / "try_it_now.png"  # the workflow of that name after a run
RESULT = "_result"  # after the node's name, in the names of the pictures of results
# the workflow whose run each help page shows
RUNS = {
    "EasyRefApply": "try_it_now",
    "EasyRefDemo": "try_it_now",
    "EasyRefInstruction": "style_from_a_group_tiny",
    "EasyRefReferenceAttention": "inspecting_a_group_tiny",
    "EasyRefReferenceInfluence": "inspecting_a_group_tiny",
    "EasyRefSheet": "choosing_a_weight_tiny",
    "EasyRefTokensOverFrames": "animation_frames_tiny",
    "EasyRefWhereItActs": "inspecting_a_group_tiny",
}


def thumbnails() -> list[Path]:
    return sorted(WORKFLOWS.glob("*.jpg"))


def help_pictures() -> list[Path]:
    return sorted(HELP.glob("*.png")) + sorted(HELP.glob("*.jpg"))


def all_pictures() -> list[Path]:
    return [*thumbnails(), *help_pictures(), SCREENSHOT]


def result_picture(node: str) -> Path:
    """The picture of a result on a node's help page."""
    return HELP / f"{node}{RESULT}.jpg"


def digest(picture: Path) -> str:
    """Hash of a picture's sources."""
    return hashlib.sha256(json.dumps(_sources(picture), sort_keys=True).encode()).hexdigest()[:16]


def records() -> dict[str, str]:
    """{path of a picture: digest of its sources when it was made}."""
    return json.loads(RECORDS.read_text(encoding="utf-8"))


def record(made: Iterable[Path]) -> None:
    """Record that these pictures show today's sources, and forget those that are gone."""
    known = records() if RECORDS.exists() else {}
    known |= {key(picture): digest(picture) for picture in made}
    known = {name: known[name] for name in sorted(known.keys() & set(map(key, all_pictures())))}
    RECORDS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def key(picture: Path) -> str:
    """The name of a picture in the records."""
    return f"{picture.parent.name}/{picture.name}"


def _sources(picture: Path) -> list[Any]:
    """The workflow and the schemas of its nodes, or the schema of the one node that is drawn."""
    schemas = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    if picture == SCREENSHOT:
        return _of_workflow(WORKFLOWS / f"{picture.stem}.json", schemas)
    if picture.suffix == ".png":
        return [schemas[picture.stem]]
    if picture.stem.endswith(RESULT):
        return _of_workflow(WORKFLOWS / f"{RUNS[picture.stem.removesuffix(RESULT)]}.json", schemas)
    return _of_workflow(picture.with_suffix(".json"), schemas)


def _of_workflow(workflow: Path, schemas: Mapping[str, Any]) -> list[Any]:
    saved = json.loads(workflow.read_text(encoding="utf-8"))
    inner = [one["nodes"] for one in saved.get("definitions", {}).get("subgraphs", [])]
    types = {node["type"] for nodes in (saved["nodes"], *inner) for node in nodes}
    return [saved, *(schemas[name] for name in sorted(types & schemas.keys()))]
