"""The archive of the registry, unpacked in a real host: it has every node, and its tiny model runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from devkit.host import graphs
from devkit.host.server import PACKS, ComfyServer
from devkit.hosts import ROOT
from devkit.project import archive_files

from .conftest import HOST

pytestmark = pytest.mark.one_host

if not (ROOT / ".git").exists():
    pytest.skip("the archive is made of git's files", allow_module_level=True)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "easyref"
    for file in archive_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


def test_archive_has_every_node_and_its_tiny_model_runs(unpacked: Path) -> None:
    graph = graphs.from_file(unpacked / "workflows" / "try_it_now.json")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
    packs = {name: folder for name, folder in PACKS.items() if folder != ROOT} | {"easyref": unpacked}
    with ComfyServer(HOST, packs=packs) as server:
        nodes = {
            name
            for name, node in server.object_info().items()
            if node["python_module"] == "custom_nodes.easyref"
        }
        assert nodes == set(json.loads((ROOT / "node_list.json").read_text(encoding="utf-8")))
        assert "try_it_now" in json.loads(server.get("/workflow_templates"))["easyref"]
        assert server.images(server.run(graph))
