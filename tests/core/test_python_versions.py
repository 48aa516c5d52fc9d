"""The pack runs on every Python that pyproject.toml says it does; newer syntax and newer names are not used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from devkit.hosts import ROOT
from devkit.project import pyproject

OLDEST = (3, 10)
SOURCES = [
    file
    for folder in ("nodes", "easyref_core", "tools", "tests", "devkit")
    for file in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "__init__.py"]

# Modules, and names of the standard library, that came after 3.10.
NEWER = {
    "tomllib": "3.11",
    "asyncio.TaskGroup": "3.11",
    "asyncio.timeout": "3.11",
    "contextlib.chdir": "3.11",
    "datetime.UTC": "3.11",
    "enum.ReprEnum": "3.11",
    "enum.StrEnum": "3.11",
    "hashlib.file_digest": "3.11",
    "inspect.getmembers_static": "3.11",
    "logging.getLevelNamesMapping": "3.11",
    "math.cbrt": "3.11",
    "math.exp2": "3.11",
    "operator.call": "3.11",
    "typing.LiteralString": "3.11",
    "typing.Never": "3.11",
    "typing.NotRequired": "3.11",
    "typing.Required": "3.11",
    "typing.Self": "3.11",
    "typing.TypeVarTuple": "3.11",
    "typing.Unpack": "3.11",
    "typing.assert_never": "3.11",
    "typing.assert_type": "3.11",
    "typing.reveal_type": "3.11",
    "itertools.batched": "3.12",
    "math.sumprod": "3.12",
    "typing.TypeAliasType": "3.12",
    "typing.override": "3.12",
    "copy.replace": "3.13",
    "typing.ReadOnly": "3.13",
    "typing.TypeIs": "3.13",
    "warnings.deprecated": "3.13",
}
BUILTINS = {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"}
# of every object's, so only names that are nobody else's
METHODS = {
    "add_note",
    "full_match",
    "from_uri",
    "walk_up",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def newer_names(tree: ast.AST) -> set[str]:
    """Names in a module that Python 3.10 has not."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(NEWER)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & set(NEWER)
        elif isinstance(node, ast.Attribute):
            found |= {f"{ast.unparse(node.value)}.{node.attr}"} & set(NEWER) | {node.attr} & METHODS
            if node.attr == "walk" and ast.unparse(node.value) not in ("ast", "os"):
                found.add("Path.walk")
        elif isinstance(node, ast.Name):
            found |= {node.id} & BUILTINS
    return found


def test_the_oldest_python_reads_and_knows_every_source() -> None:
    found = {}
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"), name_of(file), feature_version=OLDEST)
        found[name_of(file)] = newer_names(tree)
    assert found.pop("devkit/project.py") == {"tomllib"}  # which says what to do without it
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import tomllib", "tomllib"),
        ("from typing import Self", "typing.Self"),
        ("import itertools\nitertools.batched(x, 2)", "itertools.batched"),
        ("raise ExceptionGroup('a', [])", "ExceptionGroup"),
        ("for a in Path('.').walk(): ...", "Path.walk"),
    ],
)
def test_the_check_knows_newer_names(source: str, name: str) -> None:
    assert newer_names(ast.parse(source)) == {name}


def test_newer_syntax_is_seen() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* ValueError: ...", feature_version=OLDEST)


def test_the_project_says_the_same_everywhere() -> None:
    oldest = ".".join(map(str, OLDEST))
    assert pyproject()["project"]["requires-python"] == f">={oldest}"
    assert f"({oldest} or newer)" in (ROOT / "Makefile").read_text(encoding="utf-8")
