"""The nodes as the frontend receives them, and the import of the pack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devkit.host.locales import PACK
from devkit.hosts import ROOT

from .conftest import HOST

SNAPSHOT = Path(__file__).with_name("object_info.json")
NAMES = sorted(json.loads(SNAPSHOT.read_text()))
OPTIONS = "default min max step control_after_generate multiline dynamicPrompts advanced".split()
FILES = ("checkpoint", "mllm", "file")  # inputs with options that depend on the folders


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, Any]:
    """Object info of this pack's nodes."""
    return {name: node for name, node in server.object_info().items() if node["python_module"] == PACK}


def inputs_of(node: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(name, required or optional, type, options) in order."""
    return [
        (name, section, node["input"][section][name][0], node["input"][section][name][1])
        for section in ("required", "optional")
        for name in node["input_order"].get(section, [])
    ]


def described(node: dict[str, Any]) -> dict[str, Any]:
    """Everything in a node's info that saved workflows depend on."""

    def one(name: str, section: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        chosen = {key: options[key] for key in OPTIONS if key in options}
        if "options" in options and name not in FILES:
            chosen["options"] = options["options"]
        if "template" in options:
            chosen["template"] = {key: options["template"][key] for key in ("prefix", "min", "max")}
        return {"name": name, "in": section, "type": kind, **chosen}

    return {
        "name": node["display_name"],
        "category": node["category"],
        "inputs": [one(*entry) for entry in inputs_of(node)],
        "outputs": dict(zip(node["output_name"], node["output"], strict=True)),
        "takes lists": node["is_input_list"],
    }


def test_schemas_are_those_of_saved_workflows(nodes, tmp_path):
    found = {name: described(node) for name, node in nodes.items()}
    (tmp_path / "object_info.json").write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(SNAPSHOT.read_text()), (
        "inputs, outputs or defaults changed, which breaks saved workflows; if that is meant, copy "
        f"{tmp_path / 'object_info.json'} over {SNAPSHOT.name}"
    )


def test_every_input_and_output_has_a_tooltip_and_every_node_a_description(nodes):
    for name, node in nodes.items():
        assert all(options.get("tooltip") for *_, options in inputs_of(node)), name
        assert all(node["output_tooltips"]), name
        assert node["description"], name


@pytest.mark.parametrize("name", NAMES)
def test_help_page_is_served_and_explains_every_setting(server, nodes, name: str):
    page = (ROOT / "web" / "docs" / f"{name}.md").read_bytes()
    assert server.get(f"/extensions/ComfyUI-EasyRef/docs/{name}.md") == page
    assert len(page) > 200
    widgets = ("COMBO", "STRING", "INT", "FLOAT")
    settings = [entry for entry, _, kind, _ in inputs_of(nodes[name]) if kind in widgets]
    assert [setting for setting in settings if setting not in page.decode()] == []


IMPORT = """
import contextlib, io, json, logging, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from devkit.cpu_torch import complete_cpu_torch
complete_cpu_torch()
from devkit.host.in_process import enter_host, load_pack
enter_host(Path({host!r}))
import comfy_api.latest, nodes  # imported by the host itself
printed = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(printed))
logging.getLogger().setLevel(logging.DEBUG)
before = set(sys.modules)
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    pack = load_pack()
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - {{pack.__name__}}
result = {{"printed": printed.getvalue(), "imported": sorted(new - sys.stdlib_module_names)}}
json.dump(result, sys.__stdout__)
"""


@pytest.mark.one_host
def test_import_prints_nothing_and_imports_no_other_package() -> None:
    """In a process with the host imported."""
    script = IMPORT.format(root=str(ROOT), host=str(HOST))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == {"printed": "", "imported": []}
