"""The forms and workflows of .github: they parse, ask for what a report needs, and name existing commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from devkit.hosts import ROOT
from devkit.project import pyproject

GITHUB = ROOT / ".github"
FORMS = [GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "feature")]
REPOSITORY = pyproject()["project"]["urls"]["Repository"]


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands() -> list[str]:
    """Commands of the test workflow, with the interpreter of each platform."""
    job = load(GITHUB / "workflows" / "test.yml")["jobs"]["test"]
    rows = job["strategy"]["matrix"]["include"]
    steps = [step["run"] for step in job["steps"] if "run" in step]
    return [step.replace("${{ matrix.python }}", row["python"]) for step in steps for row in rows]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_form_has_a_label_for_each_field(path: Path) -> None:
    form = load(path)
    assert form["name"]
    assert form["description"]
    kinds = {"textarea", "input", "dropdown"}
    assert all(field["type"] in kinds and field["attributes"]["label"] for field in form["body"])
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_bug_form_requires_what_a_report_needs() -> None:
    required = {field["id"] for field in load(FORMS[0])["body"] if field["validations"]["required"]}
    assert {"happened", "workflow", "log", "comfyui", "easyref", "gpu"} <= required


def test_links_are_of_the_repository() -> None:
    config = load(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert all(link["url"].startswith(REPOSITORY) for link in config["contact_links"])


def test_tests_run_on_three_systems_by_the_commands_of_make_test_all() -> None:
    job = load(GITHUB / "workflows" / "test.yml")["jobs"]["test"]
    systems = {row["os"].partition("-")[0] for row in job["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu", "windows", "macos"}
    scripts = {re.search(r"python (tools/\w+\.py(?: --all)?)$", command)[1] for command in commands()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all((ROOT / script.split()[0]).is_file() and script in makefile for script in scripts)
    assert scripts == {"tools/setup_env.py", "tools/run_tests.py --all"}


def test_publishing_needs_the_tag_of_the_version() -> None:
    job = load(GITHUB / "workflows" / "publish.yml")["jobs"]["publish"]
    assert job["if"] == f"github.repository == '{REPOSITORY.removeprefix('https://github.com/')}'"
    (check,) = (step["run"] for step in job["steps"] if "run" in step)
    pattern = re.search(r'"(version = .*)" pyproject\.toml', check)[1].replace('\\"', '"')
    line = pattern.replace("${GITHUB_REF_NAME#v}", pyproject()["project"]["version"])
    assert line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
