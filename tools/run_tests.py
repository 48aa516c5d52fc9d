"""Runs every check there is: ruff, the tests that need no ComfyUI, folder by folder, and the host tests once for each ComfyUI.

As many of these parts run at once as there are cores, so each computes with one thread; what a part prints comes when it
has ended. The last line printed is the sum, "N passed, N failed, N skipped". Tests of what the version of ComfyUI does not
touch (marked one_host) run in the first ComfyUI alone; with --all in every one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.hosts import ROOT, find_hosts, host_version


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


def run_pytest(name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Counts:
    """One pytest process; a crash that reports no failed test counts as one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        suite = ElementTree.parse(report).find("testsuite") if report.is_file() else None
    print(f"\n{name}\n{ran.stdout}", flush=True)
    total, failures, errors, skipped = (
        int(suite.get(name)) if suite is not None else 0
        for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return Counts(max(total - failed - skipped, 0), failed or int(ran.returncode != 0), skipped)


def main() -> None:
    """Run the parts, print the summary, and fail when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every host test in every ComfyUI")
    everything = parser.parse_args().all
    parts = {"ruff": run_ruff()}
    hosts = find_hosts()
    print(f"running the core's tests and those of {len(hosts)} ComfyUI ...", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {
            f"ComfyUI {host_version(host)}": pool.submit(
                run_pytest,
                f"ComfyUI at {host}",
                "tests/host",
                *([] if host == hosts[0] or everything else ["-m", "not one_host"]),
                env={"COMFYUI_PATH": str(host)},
            )
            for host in hosts
        }
        parents = Counter(test.parent for test in (ROOT / "tests").glob("*/test_*.py"))
        for folder, _ in parents.most_common():  # the shortest last, so that the cores end together
            if folder.name != "host":
                running[folder.name] = pool.submit(run_pytest, folder.name, f"tests/{folder.name}")
        parts |= {name: part.result() for name, part in running.items()}

    print()
    for name, counts in parts.items():
        print(f"{name}: {counts}")
    if not hosts:
        print("ComfyUI: none found, host tests skipped")
    if hosts[1:] and not everything:
        print(
            f"tests marked one_host: in ComfyUI {host_version(hosts[0])} alone (make test-all: in every one)"
        )
    total = Counts(*map(sum, zip(*parts.values(), strict=True)))
    print(total, flush=True)
    sys.exit(total.failed > 0)


if __name__ == "__main__":
    main()
