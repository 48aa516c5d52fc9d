"""Every shipped workflow runs in the host, with tiny models for the large ones."""

from __future__ import annotations

import pytest

from ..hosts import ROOT
from . import tiny_workflow

WORKFLOWS = sorted(file for file in (ROOT / "workflows").glob("*.json") if file.stem != "try_it_now")


@pytest.fixture(scope="module", autouse=True)
def files(server):
    tiny_workflow.install(server)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_it_ends_in_pictures(server, workflow):
    history = server.run(tiny_workflow.tiny(workflow))
    assert server.images(history)
