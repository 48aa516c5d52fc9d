"""What the sources may not say on any platform: the name of a device, and text read in whatever encoding is the system's."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from devkit.hosts import ROOT

SOURCES = sorted(
    file for folder in ("nodes", "easyref_core", "tools") for file in (ROOT / folder).rglob("*.py")
)
# Runs inside the host; training, mrbench and bench choose their device themselves, and tiny is made by the first two.
OUTSIDE = {"training", "mrbench", "bench", "tiny", "tools"}
RUNTIME = [file for file in SOURCES if not OUTSIDE & set(file.parts)]
DEVICES = ("cuda", "mps", "xpu", "privateuseone")
TEXT = ("read_text", "write_text")


def names_a_device(node: ast.AST) -> bool:
    """A device as text ("cuda", "cuda:0"), torch.cuda and its like, x.cuda(), autocast, or a default for all."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.split(":")[0] in DEVICES
    if isinstance(node, ast.Attribute):
        return node.attr in (*DEVICES, "autocast", "set_default_device", "set_default_dtype")
    return False


def places(files: list[Path], wrong: Callable[[ast.AST], bool]) -> list[str]:
    """Where something wrong is, as file:line."""
    return [
        f"{file.relative_to(ROOT).as_posix()}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if wrong(node)
    ]


def test_no_device_is_named() -> None:
    """Ask comfy.model_management, or take the device of a tensor that is there."""
    assert places(RUNTIME, names_a_device) == []


def mode_of(call: ast.Call) -> str:
    """The mode of an open(path, mode) or path.open(mode), "r" if it names none."""
    place = 1 if isinstance(call.func, ast.Name) else 0
    given = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
    return given[0].value if given and isinstance(given[0], ast.Constant) else "r"


def opens_text_unnamed(call: ast.AST) -> bool:
    """Is this a reading or writing of text that does not say its encoding?"""
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
    assert places(SOURCES, opens_text_unnamed) == []


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
def test_the_check_knows_text(source: str, wrong: bool) -> None:
    assert any(opens_text_unnamed(node) for node in ast.walk(ast.parse(source))) == wrong
