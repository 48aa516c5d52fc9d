"""Assertions and a folder that the tests of bad input share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from devkit import golden


def error_of(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def assert_says(text: str, *parts: str) -> None:
    """Assert that a text holds all parts, in this order. " … " in a part matches any text."""
    at = 0
    for part in " … ".join(parts).split(" … "):
        at = text.find(part, at)
        assert at >= 0, f"{part!r} is not in (the rest of) {text!r}"


def assert_refused(call: Callable[[], object], *parts: object, kind: type[Exception] = ValueError) -> None:
    """Assert that a call raises an error whose text holds all parts, in this order."""
    assert_says(error_of(call, kind), *map(str, parts))


def folder_with(folder: Path, **changes: object) -> Path:
    """The golden MLLM folder with another config.json."""
    shutil.copytree(golden.MLLM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
