"""The nodes in /object_info, their help pages, and the import of the pack in the host."""

from __future__ import annotations

import compileall
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
NAMES = {
    "EasyRefLoader": "Load EasyRef",
    "EasyRefGroup": "Reference Group",
    "EasyRefEncodeGroup": "Encode Reference Group",
    "EasyRefAggregate": "Aggregate Reference Tokens",
    "EasyRefApply": "Apply EasyRef",
    "EasyRefDemo": "Tiny Demo Model",
    "EasyRefGroupFromFolder": "Reference Group from Folder",
    "EasyRefSelectReferences": "Select References",
    "EasyRefCropReference": "Crop References",
    "EasyRefInstruction": "Reference Instruction",
    "EasyRefGroupBudget": "Group Budget",
    "EasyRefWeighReferences": "Weigh References",
    "EasyRefSaveTokens": "Save Reference Tokens",
    "EasyRefLoadTokens": "Load Reference Tokens",
    "EasyRefCombineTokens": "Combine Reference Tokens",
    "EasyRefBatchTokens": "Batch Reference Tokens",
    "EasyRefTokensOverFrames": "Reference Tokens over Frames",
    "EasyRefConsistency": "Reference Consistency",
    "EasyRefWeightSheet": "Weight Sheet",
    "EasyRefSheet": "Assemble Sheet",
    "EasyRefReferenceAttention": "Reference Attention",
    "EasyRefReferenceInfluence": "Reference Influence",
    "EasyRefRecord": "Record Where It Acts",
    "EasyRefWhereItActs": "Where It Acts",
}
OPTIONS = "default min max step control_after_generate multiline dynamicPrompts advanced".split()
FILES = ("checkpoint", "mllm", "file")  # their options depend on the content of the folders


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


def schema_of(node: dict[str, Any]) -> dict[str, Any]:
    """The part of a node's schema that saved workflows depend on."""

    def one(name: str, section: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        stable = {key: options[key] for key in OPTIONS if key in options}
        if "options" in options and name not in FILES:
            stable["options"] = options["options"]
        if "template" in options:
            stable["template"] = {key: options["template"][key] for key in ("prefix", "min", "max")}
        return {"name": name, "in": section, "type": kind, **stable}

    return {
        "inputs": [one(*entry) for entry in inputs_of(node)],
        "outputs": dict(zip(node["output_name"], node["output"], strict=True)),
        "takes lists": node["is_input_list"],
    }


def test_schemas_match_the_snapshot(nodes, tmp_path):
    schemas = {name: schema_of(node) for name, node in nodes.items()}
    (tmp_path / "object_info.json").write_text(json.dumps(schemas, indent=1) + "\n")
    assert schemas == json.loads(SNAPSHOT.read_text()), (
        "Inputs, outputs or defaults changed, which breaks saved workflows. If this is intended, copy "
        f"{tmp_path / 'object_info.json'} over {SNAPSHOT.name}"
    )


def test_names_and_category(nodes):
    assert {name: node["display_name"] for name, node in nodes.items()} == NAMES
    categories = {name: node["category"] for name, node in nodes.items()}
    assert categories.pop("EasyRefDemo") == "EasyRef/demo"
    assert set(categories.values()) == {"EasyRef", "EasyRef/tokens", "EasyRef/look"}


def test_every_input_and_output_has_a_tooltip(nodes):
    without = [
        f"{name}.{entry[0]}"
        for name in nodes
        for entry in inputs_of(nodes[name])
        if not entry[3].get("tooltip")
    ]
    without += [name for name, node in nodes.items() if not all(node["output_tooltips"])]
    assert without == []


def test_every_node_has_a_description(nodes):
    assert all(node["description"] for node in nodes.values())


@pytest.mark.parametrize("name", NAMES)
def test_help_page_is_served(server, name: str):
    page = ROOT / "web" / "docs" / f"{name}.md"
    assert server.get(f"/extensions/ComfyUI-EasyRef/docs/{name}.md") == page.read_bytes()
    assert page.stat().st_size > 200


@pytest.mark.parametrize("name", NAMES)
def test_help_page_explains_every_setting(nodes, name: str):
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    settings = [
        entry[0] for entry in inputs_of(nodes[name]) if entry[2] in ("COMBO", "STRING", "INT", "FLOAT")
    ]
    assert [setting for setting in settings if setting not in page] == []


IMPORT = """
import asyncio, contextlib, io, json, logging, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from devkit.cpu_torch import complete_cpu_torch
complete_cpu_torch()
from devkit.host.in_process import enter_host, load_pack
enter_host(Path({host!r}))
import comfy_api.latest, nodes  # what the host itself imports
printed = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(printed))
logging.getLogger().setLevel(logging.DEBUG)
before, seconds = set(sys.modules), []
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for _ in range(3):
        start = time.process_time()  # because other processes may keep the machine busy
        pack = load_pack()
        seconds.append(time.process_time() - start)
        for name in [name for name in sys.modules if name.startswith(pack.__name__)]:
            del sys.modules[name]
foreign = {{name.partition(".")[0] for name in set(sys.modules) - before}}
report = {{"seconds": min(seconds), "printed": printed.getvalue(), "foreign": sorted(foreign)}}
json.dump(report, sys.__stdout__)
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """Seconds, output and new modules of importing the compiled pack after the host."""
    for name in ("easyref_core", "nodes"):
        compileall.compile_dir(ROOT / name, quiet=1)
    script = IMPORT.format(root=str(ROOT), host=str(HOST))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_import_prints_nothing(imported):
    assert imported["printed"] == ""


def test_import_takes_less_than_a_tenth_of_a_second(imported):
    assert imported["seconds"] < 0.1


def test_import_does_not_import_transformers(imported):
    """It takes seconds, so the tokenizer imports it on first use."""
    assert "transformers" not in imported["foreign"]
