"""The rules of CONTRIBUTING.md that a program can check: rooms, imports, function sizes, words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from devkit.hosts import ROOT

SHIPPED = sorted(file for room in ("easyref_core", "nodes") for file in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TOOLS = sorted(file for room in ("tools", "devkit") for file in (ROOT / room).rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (*SHIPPED, *TESTS, *TOOLS)}

# A room imports from those before it and from itself.
CORE = "utils files mllm tokens unet checkpoint model inspect training mrbench tiny".split()
NODES = "host unet_patch group tokens load encode aggregate apply inspect demo".split()

MAX_ENTRIES, MAX_POSITIONAL, MAX_LINES = 12, 5, 60
REPLACED = set(
    "Kept GroupReader Work in_pieces whole_files Unfilled scaled require_own brief HELD_BACK Moment "
    "to_the_others odd_one STANDS_OUT FEWEST captioned stacked overlaid fitted HEAT Sides Handout View Rows "
    "Acting IDLE era announce_step name_conditionings Emptying keep_to_schema text_rotation kept_on put_back "
    "VISION_PIECE MASKED "
    "SMALLEST_PIECE PIXELS PREFIXES unread unseen".split()
)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def at(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 1)}"


def package_of(file: Path) -> list[str]:
    return list(file.relative_to(ROOT).parent.parts)


def imports(file: Path) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Each `from ... import` of a file, with the full name of its module."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom):
            package = package_of(file)
            base = package[: len(package) - node.level + 1] if node.level else []
            yield node, ".".join([*base, *filter(None, [node.module])])


@pytest.mark.parametrize("room", ["easyref_core", "nodes"])
def test_room_has_few_entries(room: str) -> None:
    entries = {file.relative_to(ROOT / room).parts[0] for file in SHIPPED if file.is_relative_to(ROOT / room)}
    assert len(entries) <= MAX_ENTRIES


@pytest.mark.parametrize(("folder", "order"), [("easyref_core", CORE), ("nodes", NODES)])
def test_no_room_imports_upward(folder: str, order: list[str]) -> None:
    upward = []
    for file in SHIPPED:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] != folder or parts[1] == "__init__":
            continue
        for node, module in imports(file):
            names = module.split(".")
            if names[0] == folder:
                targets = [names[1]] if names[1:] else [alias.name for alias in node.names]
                upward += [
                    f"{at(file, node)} imports {target}"
                    for target in targets
                    if target in order and order.index(target) > order.index(parts[1])
                ]
    assert upward == []


def test_tools_do_not_import_tests() -> None:
    assert [
        at(f, node) for f in TOOLS for node, module in imports(f) if module.split(".")[0] == "tests"
    ] == []


def test_calls_have_few_positional_arguments() -> None:
    calls = [(f, node) for f in SHIPPED for node in ast.walk(TREES[f]) if isinstance(node, ast.Call)]
    assert [at(f, node) for f, node in calls if len(node.args) > MAX_POSITIONAL] == []


def test_functions_are_short() -> None:
    long = [
        f"{at(file, node)} {node.name}: {node.end_lineno - node.lineno + 1}"
        for file in SHIPPED
        for node in functions(TREES[file])
        if node.end_lineno - node.lineno + 1 > MAX_LINES and node.name != "define_schema"
    ]
    assert long == []


def test_closures_share_no_mutable_state() -> None:
    assert [
        at(f, node) for f in SHIPPED for node in ast.walk(TREES[f]) if isinstance(node, ast.Nonlocal)
    ] == []


def test_tests_use_no_private_attributes() -> None:
    private = [
        f"{at(file, node)} {node.attr}"
        for file in TESTS
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Attribute)
        and re.match(r"_(?!replace|asdict|fields)[a-z]", node.attr)  # NamedTuple's are public
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and ast.unparse(node.value) != "super()"
    ]
    private += [
        f"{at(file, node)} {node.args[1].value}"
        for file in TESTS
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("setattr", "getattr", "object")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
        and re.match(r"_[a-z]", str(node.args[1].value))
    ]
    assert private == []


def test_docstrings_say_what_the_thing_is() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    begin = [
        at(file, node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and re.match(r"(What|Whose|Where|How)\b", ast.get_docstring(node) or "")
    ]
    assert begin == []


def test_texts_say_is_not() -> None:
    paths = [*TREES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("web/docs/*.md")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b)", line)
    ]
    assert found == []


def test_replaced_names_are_gone() -> None:
    left = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            name = getattr(node, "name", None) or getattr(node, "attr", None) or getattr(node, "id", None)
            if name in REPLACED and "golden" not in str(file):
                left.add(f"{at(file, node)} {name}")
    assert left == set()
