"""What the repository says of itself is true: the README's map, the registry's metadata, the workflow's file."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from devkit.project import pyproject

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
PROJECT = pyproject()
ROOMS = ("utils", "files", "mllm", "tokens", "unet", "checkpoint", "inspect")


@pytest.mark.parametrize("link", LINKS)
def test_linked_file_exists(link: str) -> None:
    assert (ROOT / link).is_file()


def test_the_map_shows_every_file_of_the_core() -> None:
    files = {
        file.relative_to(ROOT).as_posix()
        for room in ("", *ROOMS)
        for file in (ROOT / "easyref_core" / room).glob("*.py")
        if file.name != "__init__.py"
    }
    assert files <= set(LINKS)


def test_table_of_contents_names_every_file_of_the_flow() -> None:
    contents = ast.get_docstring(
        ast.parse((ROOT / "easyref_core" / "__init__.py").read_text(encoding="utf-8"))
    )
    for name in re.findall(r"(\w+(?:/|\.py))", contents):
        assert (ROOT / "easyref_core" / name).exists(), name


def test_commands_of_the_readme_are_targets() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"^make (\w+)", README, re.M)) <= set(targets)


def test_runtime_needs_nothing_beyond_comfyui() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []
    assert PROJECT["project"]["dependencies"] == []


def test_registry_metadata_is_complete() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (ROOT / project["license"]["file"]).is_file()
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert comfy["requires-comfyui"] == ">=0.20.0"
    assert comfy["PublisherId"]


def test_node_list_has_every_node_id() -> None:
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "nodes").rglob("*.py")]
    ids = {node for source in sources for node in re.findall(r'node_id="(\w+)"', source)}
    assert set(json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))) == ids


@pytest.mark.parametrize("name", json.loads((ROOT / "node_list.json").read_text(encoding="utf-8")))
def test_help_page_has_the_nodes_picture(name: str) -> None:
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert f"](pictures/{name}.png)" in page
    assert (ROOT / "web" / "docs" / "pictures" / f"{name}.png").is_file()


WORKFLOWS = sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_seeds_of_a_workflow_are_fixed(name: str) -> None:
    """A seed that the frontend draws for every Run would execute its node and all after it again."""
    nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    values = [value for node in nodes for value in node.get("widgets_values", []) if isinstance(value, str)]
    assert "fixed" in values
    assert {"randomize", "increment", "decrement"}.isdisjoint(values)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_offers_its_downloads(name: str) -> None:
    """The frontend downloads what a node's `models` property names, from huggingface.co, into a folder it knows."""
    workflow = ROOT / "workflows" / f"{name}.json"
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    offered = {
        node["type"]: node["properties"]["models"] for node in nodes if "models" in node.get("properties", {})
    }
    assert set(offered) == (set() if name == "try_it_now" else {"CheckpointLoaderSimple", "EasyRefLoader"})
    for models in offered.values():
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["name"].endswith(".safetensors")
            assert model["directory"] in ("checkpoints", "easyref")
    assert workflow.with_suffix(".jpg").is_file()


def test_entry_is_small_and_silent_outside_comfyui() -> None:
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 30
    namespace = {"__package__": "", "__name__": "entry"}
    exec(compile(source, "__init__.py", "exec"), namespace)
    assert "comfy_entrypoint" not in namespace
