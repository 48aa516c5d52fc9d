"""Digests of what thumbnails were made from, recorded when they are made, so that a test finds stale ones.

tools/thumbnails.py calls `record`; tests/core/test_pictures.py compares `digest` with the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from devkit.hosts import ROOT

RECORDS = ROOT / "tools" / "thumbnails.json"
SCHEMAS = ROOT / "tests" / "host" / "object_info.json"
WORKFLOWS = ROOT / "workflows"


def thumbnails() -> list[Path]:
    return sorted(WORKFLOWS.glob("*.jpg"))


def digest(thumbnail: Path) -> str:
    """Hash of a thumbnail's sources: the workflow and the schemas of its nodes."""
    schemas = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    saved = json.loads(thumbnail.with_suffix(".json").read_text(encoding="utf-8"))
    inner = [one["nodes"] for one in saved.get("definitions", {}).get("subgraphs", [])]
    types = {node["type"] for nodes in (saved["nodes"], *inner) for node in nodes}
    sources = [saved, *(schemas[name] for name in sorted(types & schemas.keys()))]
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def records() -> dict[str, str]:
    """{name of a thumbnail: digest of its sources when it was made}."""
    return json.loads(RECORDS.read_text(encoding="utf-8"))


def record(made: Iterable[Path]) -> None:
    """Record that these thumbnails show today's sources, and forget those that are gone."""
    known = records() if RECORDS.exists() else {}
    known |= {thumbnail.name: digest(thumbnail) for thumbnail in made}
    known = {name: known[name] for name in sorted(known.keys() & {one.name for one in thumbnails()})}
    RECORDS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
