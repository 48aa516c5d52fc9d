"""Tests on the oldest and the newest packages, on every Python and ComfyUI found, as a table.

    python tools/versions.py [--pythons 3.10 3.12] [--only newest] [--tests tests/core/test_golden.py ...]

floor: the lowest versions that the extra [train] promises, on the oldest Python.
newest: the newest ones of the package index, on every Python.
ComfyUI: its requirements, as it pins them and with the newest release of each, on the Python that runs this.

uv (pip install uv) makes an environment for each row in --folder and shares one copy of each package between
them. A Python that is not on this machine is named and left out. Where the index has torch for CUDA only, it
runs on the CPU: about 6 GB for each version of torch and 1.5 GB for each Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.hosts import ROOT, find_hosts, host_version
from tools.setup_env import extras, host_requirements

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
FOLDER = Path.home() / ".cache" / "easyref-versions"
CORE_PACKAGES = ("torch", "transformers", "tokenizers", "diffusers", "numpy")
HOST_PACKAGES = (
    *("torch", "transformers", "comfy-kitchen", "comfy-aimdo"),
    *("comfyui-frontend-package", "comfyui-workflow-templates"),
)
VERSIONS = """
import json, importlib.metadata as metadata
found = metadata.distributions()
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in found}))
"""

Row = dict[str, str]


class Combination(NamedTuple):
    """One row: a Python and its packages; host: the ComfyUI whose tests run, None for tests/core."""

    name: str
    python: str
    requirements: list[str]
    host: Path | None = None


def combinations(pythons: list[str]) -> Iterator[Combination]:
    """All rows, on these Pythons and the ComfyUI checkouts found."""
    promised, tools = extras("train"), [*extras("dev"), "torchvision"]
    yield Combination("floor", pythons[0], [*(line.replace(">=", "==") for line in promised), *tools])
    for python in pythons:
        yield Combination("newest", python, tools)
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    for host in find_hosts():
        pinned, name = host_requirements(host), f"ComfyUI {host_version(host)}"
        newest = [re.sub(r"[=~]=.*", "", line) for line in pinned]
        yield Combination(f"{name}, its versions", running, [*pinned, *tools], host)
        yield Combination(f"{name}, newest", running, [*newest, *tools], host)


def output_of(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def find_python(version: str) -> Path | None:
    """An interpreter of this version ("3.12"): the running one, on PATH, or uv's or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    candidates.append(output_of("uv", "python", "find", version))
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    # pyenv's shims exist for inactive versions too, so each candidate is run
    return next((Path(path) for path in candidates if path and output_of(path, "-c", ask) == version), None)


def make_environment(combination: Combination, folder: Path) -> Path:
    """Install the combination into `folder`; -> its Python. Raises RuntimeError with uv's message."""
    interpreter = find_python(combination.python)
    if interpreter is None:
        raise RuntimeError(f"Python {combination.python} was not found on this machine")
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = ["uv", "pip", "install", "--quiet", "--no-build", "--python", python]
    for command in (
        ["uv", "venv", "--quiet", "--clear", "--python", interpreter, folder],
        [*install, *combination.requirements],
    ):
        ended = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder.parent)
        if ended.returncode:
            raise RuntimeError(ended.stderr.strip()[-2000:])
    return python


def run_tests(python: Path, host: Path | None, tests: list[str], log: Path) -> Row:
    """Run the tests; the counts, and the seconds it took."""
    variables = {"COMFYUI_PATH": str(host or ""), "OMP_NUM_THREADS": "1"}
    variables["PYTHONPYCACHEPREFIX"] = str(log.with_suffix(""))
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "--dist=loadfile"]
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        report, start = Path(folder) / "report.xml", time.monotonic()
        subprocess.run(
            [*command, *tests, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        seconds = time.monotonic() - start
        if not report.is_file():
            return {"failed": f"no test ran, see {log}"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (
        int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    counts = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
    return {name: str(count) for name, count in counts.items()} | {"seconds": f"{seconds:.0f}"}


def check(combination: Combination, tests: list[str], folder: Path) -> Row:
    """One row: make its environment, run the tests."""
    row = {"packages": combination.name, "Python": combination.python}
    place = folder / re.sub(r"[^\w.]+", "_", f"{combination.name}-python{combination.python}")
    try:
        python = make_environment(combination, place)
    except RuntimeError as error:
        print(error, flush=True)
        return row | {"failed": "not installed"}
    default = ["tests/host" if combination.host else "tests/core"]
    row |= json.loads(output_of(python, "-c", VERSIONS))
    return row | run_tests(python, combination.host, tests or default, place.with_name(f"{place.name}.log"))


def table(rows: list[Row], packages: tuple[str, ...]) -> str:
    """Rows as a Markdown table."""
    columns = ("packages", "Python", *packages, "passed", "failed", "skipped", "seconds")
    lines = [columns, ("---",) * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run every combination; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="such as 3.12")
    parser.add_argument("--only", default="", help="run the rows with this text in their name")
    parser.add_argument("--tests", nargs="+", default=[], help="instead of tests/core or tests/host")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps the environments")
    options = parser.parse_args()
    if not shutil.which("uv"):
        sys.exit("uv, which makes the environments, was not found. Install it: pip install uv")
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    rows: dict[bool, list[Row]] = {False: [], True: []}  # by whether a ComfyUI is needed
    for combination in combinations(options.pythons):
        if options.only in combination.name:
            print(f"{combination.name}, Python {combination.python}", flush=True)
            rows[combination.host is not None].append(check(combination, options.tests, folder))
    for needs_host, packages in ((False, CORE_PACKAGES), (True, HOST_PACKAGES)):
        if rows[needs_host]:
            print(f"\n{table(rows[needs_host], packages)}")
    sys.exit(any(row["failed"] != "0" for row in (*rows[False], *rows[True])))


if __name__ == "__main__":
    main()
