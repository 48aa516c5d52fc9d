"""Runs every check there is: ruff, the tests that need no ComfyUI, and the host tests once for each ComfyUI.

The last line printed is the sum, "N passed, N failed, N skipped".
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hosts import ROOT, find_hosts, host_version


class Counts(NamedTuple):
    """How the tests of one part ended."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run_ruff() -> Counts:
    """Lint and formatting, each counted as one test."""
    checks = (["check"], ["format", "--check"])
    failed = sum(
        bool(subprocess.run([sys.executable, "-m", "ruff", *c, "."], cwd=ROOT).returncode) for c in checks
    )
    return Counts(len(checks) - failed, failed, 0)


def run_pytest(*arguments: str, env: Mapping[str, str] | None = None) -> Counts:
    """One pytest process; a crash that reports no failed test counts as one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}).returncode
        suite = ElementTree.parse(report).find("testsuite") if report.is_file() else None
    total, failures, errors, skipped = (
        int(suite.get(name)) if suite is not None else 0
        for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return Counts(max(total - failed - skipped, 0), failed or int(code != 0), skipped)


def main() -> None:
    """Run the parts, print the summary, and fail when anything failed."""
    parts = {"ruff": run_ruff(), "core": run_pytest("tests", "--ignore=tests/host")}
    hosts = find_hosts()
    for host in hosts:
        name = f"ComfyUI {host_version(host)}"
        print(f"\n{name} at {host}", flush=True)
        parts[name] = run_pytest("tests/host", env={"COMFYUI_PATH": str(host)})

    print()
    for name, counts in parts.items():
        print(f"{name}: {counts}")
    if not hosts:
        print("ComfyUI: none found, host tests skipped")
    total = Counts(*map(sum, zip(*parts.values(), strict=True)))
    print(total, flush=True)
    sys.exit(total.failed > 0)


if __name__ == "__main__":
    main()
