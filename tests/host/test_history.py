"""Workflows of the history in the real frontend: what users have saved goes on working with today's nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from devkit.host import browser
from devkit.hosts import ROOT

from . import tiny_workflow

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.one_host,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH"),
]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@cache
def workflows() -> dict[str, str]:
    """The files workflows/*.json of all commits that differ in this pack's nodes, by commit and name."""
    try:
        lines = git("log", "--reverse", "--format=%h", "--raw", "--no-abbrev", "--", "workflows/*.json")
    except (OSError, subprocess.CalledProcessError):  # not a clone
        return {}
    commit, found = "", {}
    for line in lines.splitlines():
        if not line.startswith(":"):
            commit = line or commit
            continue
        _, _, _, blob, change, path = line.split(maxsplit=5)
        if change != "D":
            text = git("cat-file", "blob", blob)
            found.setdefault(saved_nodes(json.loads(text)), (f"{commit}-{Path(path).stem}", text))
    return dict(found.values())


def saved_nodes(workflow: Mapping[str, Any]) -> str:
    """What a workflow says of this pack's nodes: types, widgets, names of inputs and outputs."""
    nodes = (node for node in workflow["nodes"] if node["type"].startswith("EasyRef"))
    names = ("inputs", "outputs")
    return json.dumps(
        sorted(
            json.dumps(
                [
                    node["type"],
                    node.get("widgets_values"),
                    *([e["name"] for e in node.get(k, [])] for k in names),
                ]
            )
            for node in nodes
        )
    )


@pytest.fixture(scope="module")
def page(server):
    tiny_workflow.install(server)
    with browser.frontend(server) as page:
        yield page


@pytest.mark.parametrize("name", workflows() or [pytest.param("", marks=pytest.mark.skip("not a clone"))])
def test_saved_workflow_opens_and_runs(server, page, tmp_path: Path, name: str) -> None:
    file = tmp_path / "workflow.json"
    file.write_text(workflows()[name], encoding="utf-8")
    assert browser.open_workflow(page, file) == []
    types = {node["type"] for node in json.loads(workflows()[name])["nodes"]}
    if "CheckpointLoaderSimple" in types:
        browser.use_tiny_models(page)
    else:
        browser.set_widgets(page, {"KSampler": {"steps": 2}})
    history = browser.queue(server, page)
    assert history["status"]["status_str"] == "success", history["status"]
    assert server.images(history)
