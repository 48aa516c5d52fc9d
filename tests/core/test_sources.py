"""Sources must not name a device or open text without naming its encoding."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from devkit.hosts import ROOT

SOURCES = sorted(
    file for folder in ("nodes", "easyref_core", "tools") for file in (ROOT / folder).rglob("*.py")
)
# Code outside the host chooses its device itself.
OUTSIDE = {"training", "mrbench", "tiny", "tools"}
RUNTIME = [file for file in SOURCES if not OUTSIDE & set(file.parts)]
DEVICES = ("cuda", "mps", "xpu", "privateuseone")
TEXT = ("read_text", "write_text")


def names_a_device(node: ast.AST) -> bool:
    """True for a device as text ("cuda:0"), torch.cuda and similar, x.cuda(), autocast, or a default."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.split(":")[0] in DEVICES
    if isinstance(node, ast.Attribute):
        return node.attr in (*DEVICES, "autocast", "set_default_device", "set_default_dtype")
    return False


def positions(files: list[Path], wrong: Callable[[ast.AST], bool]) -> list[str]:
    """Nodes for which `wrong` is true, as file:line."""
    return [
        f"{file.relative_to(ROOT).as_posix()}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if wrong(node)
    ]


def test_no_device_is_named() -> None:
    """Code in the host takes its device from comfy.model_management or from a tensor."""
    assert positions(RUNTIME, names_a_device) == []


def mode_of(call: ast.Call) -> str:
    """The mode of an open(path, mode) or path.open(mode); the default is "r"."""
    index = 1 if isinstance(call.func, ast.Name) else 0
    modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[index : index + 1]
    return modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"


def opens_text_without_encoding(call: ast.AST) -> bool:
    """True if this reads or writes text without naming its encoding."""
    if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute):
        if call.func.attr in TEXT:
            return True
        owner = call.func.value
        other = isinstance(owner, ast.Name) and owner.id in ("Image", "self", "os")
        return call.func.attr == "open" and not other and "b" not in mode_of(call)
    return isinstance(call.func, ast.Name) and call.func.id == "open" and "b" not in mode_of(call)


def test_text_names_its_encoding() -> None:
    assert positions(SOURCES, opens_text_without_encoding) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("open(p)", True),
        ("open(p, 'rb')", False),
        ("p.open('w', newline='')", True),
        ("p.open(encoding='utf-8')", False),
        ("p.read_text()", True),
        ("Image.open(p)", False),
    ],
)
def test_text_without_an_encoding_is_noticed(source: str, wrong: bool) -> None:
    assert any(opens_text_without_encoding(node) for node in ast.walk(ast.parse(source))) == wrong
