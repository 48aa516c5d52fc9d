"""The pack runs on every Python that pyproject.toml names: sources use no newer syntax and no newer names."""

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

# Modules and names of the standard library that are newer than 3.10.
NEWER = set(
    # 3.11
    "tomllib asyncio.TaskGroup asyncio.timeout contextlib.chdir datetime.UTC enum.ReprEnum enum.StrEnum "
    "hashlib.file_digest inspect.getmembers_static logging.getLevelNamesMapping math.cbrt math.exp2 "
    "operator.call typing.LiteralString typing.Never typing.NotRequired typing.Required typing.Self "
    "typing.TypeVarTuple typing.Unpack typing.assert_never typing.assert_type typing.reveal_type "
    # 3.12 and 3.13
    "itertools.batched math.sumprod typing.TypeAliasType typing.override "
    "copy.replace typing.ReadOnly typing.TypeIs warnings.deprecated".split()
)
BUILTINS = {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"}
METHODS = {"add_note", "full_match", "from_uri", "walk_up"}  # of any object, so only unusual names


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def newer_names(tree: ast.AST) -> set[str]:
    """Names in a module that Python 3.10 lacks."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & NEWER
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & NEWER
        elif isinstance(node, ast.Attribute):
            found |= {f"{ast.unparse(node.value)}.{node.attr}"} & NEWER | {node.attr} & METHODS
            if node.attr == "walk" and ast.unparse(node.value) not in ("ast", "os"):
                found.add("Path.walk")
        elif isinstance(node, ast.Name):
            found |= {node.id} & BUILTINS
    return found


def test_every_source_runs_on_the_oldest_python() -> None:
    found = {}
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"), name_of(file), feature_version=OLDEST)
        found[name_of(file)] = newer_names(tree)
    assert found.pop("devkit/project.py") == {"tomllib"}  # which has a fallback
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
def test_newer_names_are_noticed(source: str, name: str) -> None:
    assert newer_names(ast.parse(source)) == {name}


def test_newer_syntax_is_noticed() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* ValueError: ...", feature_version=OLDEST)


def test_the_project_says_the_same_everywhere() -> None:
    oldest = ".".join(map(str, OLDEST))
    assert pyproject()["project"]["requires-python"] == f">={oldest}"
    assert f"({oldest} or newer)" in (ROOT / "Makefile").read_text(encoding="utf-8")
