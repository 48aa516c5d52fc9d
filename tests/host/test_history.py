"""Workflows of the history in the real frontend: what users have saved goes on working with today's nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from devkit.host import browser
from devkit.hosts import ROOT

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.one_host,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH"),
]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def saved_files() -> Iterator[tuple[str, str]]:
    """Each file workflows/*.json of each commit, as <commit>-<name>, and its text."""
    commit = ""
    for line in git(
        "log", "--format=%h", "--raw", "--no-abbrev", "-m", "--", "workflows/*.json"
    ).splitlines():
        if not line.startswith(":"):
            commit = line or commit
            continue
        _, _, _, blob, change, path = line.split(maxsplit=5)
        if change != "D":
            yield f"{commit}-{Path(path).stem}", git("cat-file", "blob", blob)


def nodes_of(workflow: Mapping[str, Any]) -> str:
    """This pack's nodes of a workflow: types, widgets, and names of inputs and outputs."""
    nodes = [
        (
            node["type"],
            node.get("widgets_values"),
            [[slot["name"] for slot in node.get(side, [])] for side in ("inputs", "outputs")],
        )
        for node in workflow["nodes"]
        if node["type"].startswith("EasyRef")
    ]
    return repr(sorted(map(repr, nodes)))


def test_saved_workflows_open_and_run(server, opened, tmp_path: Path) -> None:
    """Those that differ in this pack's nodes."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone, so there is no history")
    different = {nodes_of(json.loads(text)): (name, text) for name, text in saved_files()}
    assert different
    failed = {}
    for name, text in different.values():
        file = tmp_path / f"{name}.json"
        file.write_text(text, encoding="utf-8")
        unknown = browser.open_workflow(opened, file)
        browser.shorten(opened)
        history = browser.queue(server, opened)
        status = history["status"]
        if unknown or status["status_str"] != "success" or not server.images(history):
            failed[name] = unknown, status
    assert failed == {}
