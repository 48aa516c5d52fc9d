"""The repository's documents and metadata agree with its files: links, pictures, node list, workflows."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from devkit.project import pyproject

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HELP = ROOT / "web" / "docs"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("easyref_core/**/README.md"),
    *ROOT.glob("web/docs/**/*.md"),
]
PROJECT = pyproject()
MODULES = [
    file
    for folder in ("easyref_core", "nodes")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file.name not in ("__init__.py", "__main__.py")
]


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # the frontend resolves the links of help pages from web/docs, in every language
    folder = HELP if page.is_relative_to(HELP) else page.parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            name, _, anchor = link.partition("#")
            target = folder / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def rooms_of(file: Path) -> str:
    """The room of a module, as the picture names it: mllm, model, nodes."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "easyref_core" else parts[0]


def test_architecture_picture_has_the_imports_between_rooms() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+)$", ARCHITECTURE, re.M))
    imported = set()
    for file in MODULES:
        package = list(file.relative_to(ROOT).parent.parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                names = [*base, *filter(None, [node.module])]
                names = ".".join(names).split(".")
                if names[0] == "easyref_core" and len(names) > 1:
                    imported.add((rooms_of(file), names[1]))
    below = {"utils", "files"}  # every room uses them; their arrows would hide the others
    assert drawn == {(a, b) for a, b in imported if a != b and b not in below}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_architecture_lists_every_module_by_its_first_line(file: Path) -> None:
    first = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0]
    assert first
    assert f"](../{file.relative_to(ROOT).as_posix()})" in ARCHITECTURE


def test_architecture_names_functions_that_exist() -> None:
    traced = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", ARCHITECTURE)
    assert len(traced) > 20
    for name, path in traced:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b|^{name} =", source, re.M), f"{path}: {name}"


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


NODES = sorted(json.loads((ROOT / "node_list.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", [f"{name}{end}.md" for name in NODES for end in ("", "/zh")])
def test_help_page_has_the_nodes_picture(page: str) -> None:
    name = re.split("[./]", page)[0]
    assert f"](pictures/{name}.png)" in (HELP / page).read_text(encoding="utf-8")
    assert (HELP / "pictures" / f"{name}.png").is_file()


def parts_of(page: Path) -> dict[str, int]:
    """The number of headings, table rows, list items and links of a page."""
    text = page.read_text(encoding="utf-8")
    kinds = {"headings": r"^#", "rows": r"^\|", "items": r"^- ", "links": r"\]\("}
    return {kind: len(re.findall(pattern, text, re.M)) for kind, pattern in kinds.items()}


@pytest.mark.parametrize("name", NODES)
def test_translated_help_page_has_the_parts_of_the_english_one(name: str) -> None:
    translated = HELP / name / "zh.md"
    assert parts_of(translated) == parts_of(HELP / f"{name}.md")
    texts = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))[name]
    lines = translated.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {texts['display_name']}"
    names = {value["name"] for part in ("inputs", "outputs") for value in texts.get(part, {}).values()}
    cells = [line.split("|")[1] for line in lines if line.startswith("| **")]
    bold = {name for cell in cells for name in re.findall(r"\*\*(.+?)\*\*", cell)}
    assert bold <= names | {"tokens0", "tokens1"}  # sockets that grow have no names of their own


WORKFLOWS = sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))


def nodes_of(name: str) -> list[dict]:
    """The nodes of a workflow and of its subgraphs."""
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    inner = (subgraph["nodes"] for subgraph in saved.get("definitions", {}).get("subgraphs", []))
    return [*saved["nodes"], *(node for nodes in inner for node in nodes)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_seeds_of_a_workflow_are_fixed(name: str) -> None:
    """A seed that the frontend draws for every Run would execute its node and all after it again."""
    nodes = nodes_of(name)
    values = [value for node in nodes for value in node.get("widgets_values", []) if isinstance(value, str)]
    assert "fixed" in values
    assert {"randomize", "increment", "decrement"}.isdisjoint(values)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_offers_its_downloads(name: str) -> None:
    """The frontend downloads the `models` property of a node from huggingface.co into a known folder."""
    offered = {
        node["type"]: node["properties"]["models"]
        for node in nodes_of(name)
        if "models" in node.get("properties", {})
    }
    without_download = any(node["type"] == "EasyRefDemo" for node in nodes_of(name))
    assert set(offered) == (set() if without_download else {"CheckpointLoaderSimple", "EasyRefLoader"})
    for models in offered.values():
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["name"].endswith(".safetensors")
            assert model["directory"] in ("checkpoints", "easyref")
    assert (ROOT / "workflows" / f"{name}.jpg").is_file()


def test_entry_is_small_and_silent_outside_comfyui() -> None:
    entry = ROOT / "__init__.py"
    assert len(entry.read_text(encoding="utf-8").splitlines()) <= 30
    assert "comfy_entrypoint" not in runpy.run_path(str(entry), run_name="entry")  # with __package__ empty
