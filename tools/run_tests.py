"""Run ruff, pyrefly, the tests in the first ComfyUI found, and the version-dependent ones in each further.

pytest-xdist spreads the files over the cores; each worker computes with one thread. Without a ComfyUI, the
tests in tests/host are skipped. `--all` also runs the tests marked thorough, and those marked one_host in
every ComfyUI. `--quick` runs the fast tests of tests/core alone, for each commit. Other arguments go to
pytest: `-p randomly` shuffles the tests and prints the seed, which `--randomly-seed` repeats. A whole run
ends with the slowest files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.hosts import ROOT, find_hosts, host_version

# The rules of the repository, the golden numbers, and what is pure arithmetic or parsing.
QUICK = [
    f"tests/core/test_{name}.py"
    for name in "archive atomic_write github golden house images layer_weights masks number_lists "
    "prompt_syntax python_versions quirks reference_masks reference_weights released_layout repository "
    "scaling schedule security sources token_files unet_layout".split()
]


def run(title: str, *command: str, host: Path | None = None) -> bool:
    """Run `python -m command` in the repository; return True if it succeeds."""
    print(f"\n{title}", flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(host or "")}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env).returncode == 0


def print_slowest(reports: Path, count: int = 20) -> None:
    """Print the seconds of the slowest files, from the JUnit reports in a folder."""
    seconds: Counter[str] = Counter()
    for report in reports.glob("*.xml"):
        for case in ElementTree.parse(report).iter("testcase"):
            seconds[f"{report.stem}  {case.get('classname')}"] += float(case.get("time", 0))
    print(f"\nthe slowest files, of {seconds.total():.0f} s of tests")
    for name, value in seconds.most_common(count):
        print(f"{value:7.1f} s  {name}")


def main() -> None:
    """Run every check, also after one has failed, and exit with 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="run every test, and every host test in every ComfyUI"
    )
    parser.add_argument("--quick", action="store_true", help="run the fast tests of tests/core alone")
    parsed, options = parser.parse_known_args()
    pytest = ["pytest", "--numprocesses=auto", "--dist=loadfile", "--no-loadscope-reorder", "-q"]
    passed = [
        run("ruff check", "ruff", "check", "."),
        run("ruff format", "ruff", "format", "--check", "."),
        run("types", "pyrefly", "check", "--python-interpreter-path", sys.executable),
    ]
    if parsed.quick:
        passed.append(run("the fast tests of tests/core", *pytest, *options, *QUICK))
        sys.exit(not all(passed))

    with TemporaryDirectory() as reports:
        passed += run_in_hosts([*pytest, *options], Path(reports), everything=parsed.all)
        print_slowest(Path(reports))
    sys.exit(not all(passed))


def run_in_hosts(pytest: list[str], reports: Path, everything: bool) -> list[bool]:
    """Run the tests in each ComfyUI found, and write a JUnit report of each; return which passed."""
    hosts, passed = find_hosts() or [None], []
    for host in hosts:
        version = f"ComfyUI {host_version(host)}" if host else "no ComfyUI, so host tests are skipped"
        title = "tests" if host is hosts[0] else "tests/host"
        tests = [title]
        if not everything:
            left_out = ["thorough"] if host is hosts[0] else ["thorough", "one_host"]
            title += f" without {' and '.join(left_out)}"
            tests += ["-m", " and ".join(f"not {marker}" for marker in left_out)]
        report = f"--junitxml={reports / version}.xml"
        passed.append(run(f"{title}, {version}", *pytest, report, *tests, host=host))
    return passed


if __name__ == "__main__":
    main()
