"""Choices of the tools that run the tests: files of `make quick`, rows of the table of versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from devkit.hosts import ROOT
from devkit.project import pyproject
from tools import versions
from tools.run_tests import QUICK


def test_files_of_quick_exist() -> None:
    assert [name for name in QUICK if not (ROOT / name).is_file()] == []
    assert len(set(QUICK)) == len(QUICK) > 20


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, versions.Combination]:
    """Rows of a machine with one ComfyUI, by name."""
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.1.2"')
    (tmp_path / "requirements.txt").write_text("comfy-kitchen==0.2\ntorch\nnumpy>=1.25\npydantic~=2.0\n")
    monkeypatch.setattr(versions, "find_hosts", lambda: [tmp_path])
    return {row.name: row for row in versions.combinations(["3.10", "3.12"])}


def test_floor_is_the_lowest_version_that_the_extra_promises(rows) -> None:
    promised = [line for line in pyproject()["project"]["optional-dependencies"]["train"] if ">=" in line]
    assert len(promised) > 5
    assert {line.replace(">=", "==") for line in promised} <= set(rows["floor"].requirements)
    assert (rows["floor"].python, rows["newest"].python) == ("3.10", "3.12")


def test_newest_takes_the_host_s_requirements_without_its_pins(rows) -> None:
    pinned, newest = rows["ComfyUI 0.1.2, its versions"], rows["ComfyUI 0.1.2, newest"]
    assert pinned.requirements[:3] == ["comfy-kitchen==0.2", "numpy>=1.25", "pydantic~=2.0"]
    assert newest.requirements[:3] == ["comfy-kitchen", "numpy>=1.25", "pydantic"]
    assert not any(re.search("[=~]=", line) for line in newest.requirements)


def test_table_has_a_column_for_each_package() -> None:
    row = {"packages": "newest", "Python": "3.12", "torch": "2.15.0", "numpy": "2.5", "failed": "0"}
    assert versions.table([row], ("torch", "diffusers")).splitlines()[0::2] == [
        "| packages | Python | torch | diffusers | passed | failed | skipped | seconds |",
        "| newest | 3.12 | 2.15.0 |  |  | 0 |  |  |",
    ]
