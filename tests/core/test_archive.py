"""The archive of the Comfy registry: what the nodes need, and nothing else."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from devkit.hosts import ROOT
from devkit.project import archive_files

if not (ROOT / ".git").exists():
    pytest.skip("the archive is made of git's files", allow_module_level=True)

FILES = archive_files()
MAX_BYTES = 29_000_000
TEXTS = {"CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md"}
METADATA = {"node_list.json", "pyproject.toml", "requirements.txt"}


def imports(file: Path) -> Iterator[Path]:
    """The repository's modules that a file imports, anywhere in it, and their packages."""
    package = file.parent.parts
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                names = [*filter(None, base), alias.name]
                for length in range(1, len(names) + 1):
                    path = Path(*names[:length])
                    yield from (path.with_suffix(".py"), path / "__init__.py")


def imported() -> set[Path]:
    """All modules that ComfyUI may import from the pack."""
    found: set[Path] = set()
    waiting = [Path("__init__.py")]
    while waiting:
        file = waiting.pop()
        if file not in found and (ROOT / file).is_file():
            found.add(file)
            waiting += imports(file)
    return found


def test_modules_are_those_that_the_nodes_import() -> None:
    modules = {file for file in FILES if file.suffix == ".py"}
    assert modules == imported(), "correct .comfyignore"


def test_other_files_are_data_texts_and_metadata() -> None:
    others = {file.as_posix() for file in FILES if file.suffix != ".py"}
    folders = ("easyref_core/", "locales/", "subgraphs/", "web/", "workflows/")
    assert {name for name in others if not name.startswith(folders)} == TEXTS | METADATA
    assert sum((ROOT / file).stat().st_size for file in FILES) <= MAX_BYTES


def test_every_node_has_its_help_page_and_picture() -> None:
    kept = {file.as_posix() for file in FILES}
    for name in json.loads((ROOT / "node_list.json").read_text(encoding="utf-8")):
        assert {f"web/docs/{name}.md", f"web/docs/pictures/{name}.png"} <= kept


def test_every_template_has_its_thumbnail() -> None:
    templates = {file.relative_to(ROOT) for file in (ROOT / "workflows").glob("*.json")}
    assert templates | {file.with_suffix(".jpg") for file in templates} <= set(FILES)


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix == ".py"], ids=lambda file: file.as_posix())
def test_source_can_be_read_on_windows(file: Path) -> None:
    """Some tools read sources in the system's encoding; other letters belong into JSON files."""
    (ROOT / file).read_text(encoding="utf-8").encode("cp1252")
