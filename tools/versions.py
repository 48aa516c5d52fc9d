"""Runs the core tests (tests/core) on every Python and transformers, and prints a table.

    python tools/versions.py [--pythons 3.10 3.12] [--transformers "==4.50.3" ">=5"] [--folder FOLDER]

Makes one environment for each combination, in --folder, which keeps them for the next time. A Python that is not on this
machine is named and left out. Torch and what does not depend on transformers is installed once for each Python; where the
package index has torch for CUDA only, the CUDA libraries are installed once for all. About 11 GB of disk, and 20 to 30 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.hosts import ROOT
from tools.setup_env import TORCH, TORCHVISION

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TRANSFORMERS = ("==4.50.3", "==4.57.*", ">=5")
FOLDER = Path.home() / ".cache" / "easyref-versions"
COMMON = ("numpy", "pillow", "einops", "safetensors", "pytest>=8.3")
OF_CUDA = ("nvidia-", "cuda-", "triton")
SHOWN = ("torch", "transformers", "diffusers", "numpy")

Row = dict[str, str]


class Environment(NamedTuple):
    """A venv."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("[Ll]ib/**/site-packages"))

    def make(self, interpreter: Path, *also: Path) -> None:
        """Create it, with the packages in the folders `also` to be imported too."""
        if not self.folder.is_dir():
            run([interpreter, "-m", "venv", self.folder])
        lines = "".join(f"{folder}\n" for folder in also)
        (self.packages / "shared.pth").write_text(lines, encoding="utf-8")

    def install(self, *arguments: str | Path) -> None:
        run([self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def run(command: list[str | Path]) -> None:
    """Run a command in an empty folder; raises RuntimeError with the end of what it printed where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def find_python(version: str) -> Path | None:
    """An interpreter of this version ("3.12"): the running one, on PATH, or uv's or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    if uv := shutil.which("uv"):
        found = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
        candidates.append(found.stdout.strip())
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if candidate:  # pyenv's shims are there for versions that are not switched on too
            said = subprocess.run([str(candidate), "-c", asked], capture_output=True, text=True)
            if said.stdout.strip() == version:
                return Path(candidate)
    return None


def requirements_of_torch(packages: Path) -> tuple[list[str], list[str]]:
    """What the torch installed in a folder requires: what all of them do, and the CUDA libraries of a CUDA build."""
    (info,) = packages.glob("torch-*.dist-info")
    lines = [line for line in PathDistribution(info).requires or () if "extra ==" not in line]
    cuda = [line for line in lines if line.startswith(OF_CUDA)]
    of_cuda_build = runpy.run_path(str(packages / "torch" / "version.py"))["cuda"] is not None
    # bindings and compilers are for programs that call them
    libraries = [line for line in cuda if of_cuda_build and not line.startswith(("cuda-bindings", "triton"))]
    return [line for line in lines if line not in cuda], libraries


def with_torch(interpreter: Path, version: str, folder: Path) -> list[Path]:
    """The folders that hold torch for this Python, and the CUDA libraries if it needs them to be imported."""
    libraries = folder / "cuda"
    environment = Environment(folder / f"python{version}")
    environment.make(interpreter, libraries)
    if not list(environment.packages.glob("torchvision-*.dist-info")):
        environment.install("--no-deps", TORCH, TORCHVISION)
    common, cuda = requirements_of_torch(environment.packages)
    environment.install(*common, *COMMON)
    if cuda and not libraries.is_dir():
        environment.install("--target", libraries, *cuda)
    return [environment.packages, libraries]


def run_tests(environment: Environment) -> Row:
    """Run tests/core; the counts, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core"]
        start = time.monotonic()
        done = subprocess.run(
            [*map(str, command), f"--junitxml={report}"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPYCACHEPREFIX": str(environment.folder / "pycache"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - start
        log = environment.folder.with_name(f"{environment.folder.name}.log")
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if not report.is_file():
            return {"failed": f"no test ran, see {log}"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failed, errors, skipped = (
        int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
    )
    counts = {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}
    return {**{name: str(count) for name, count in counts.items()}, "seconds": f"{seconds:.0f}"}


def installed(environment: Environment) -> Row:
    """The versions that the tests really ran with."""
    asked = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {SHOWN}}}))"
    said = subprocess.run(
        [str(environment.python), "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(said.stdout)


def check(interpreter: Path, version: str, transformers: str, folder: Path) -> Row:
    """One combination: make its environment, run the tests."""
    name = "".join(c if c.isalnum() or c == "." else "_" for c in transformers)
    environment = Environment(folder / f"python{version}-transformers{name}")
    try:
        environment.make(interpreter, *with_torch(interpreter, version, folder))
        environment.install(f"transformers{transformers}", "diffusers>=0.31")
        return installed(environment) | run_tests(environment)
    except RuntimeError as error:
        print(error, flush=True)
        return {"transformers": transformers, "failed": "not installed"}


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    columns = ("Python", *SHOWN, "passed", "failed", "skipped", "seconds")
    lines = [columns, ("---",) * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Every combination; fails when a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="such as 3.12")
    parser.add_argument("--transformers", nargs="+", default=TRANSFORMERS, help='such as "==4.57.*"')
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the environments are kept")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    for version in given.pythons:
        interpreter = find_python(version)
        if interpreter is None:
            rows.append({"Python": version, "failed": "not found on this machine"})
            continue
        for transformers in given.transformers:
            print(f"Python {version}, transformers{transformers}", flush=True)
            rows.append({"Python": version} | check(interpreter, version, transformers, folder))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    sys.exit(any(row["failed"] != "0" for row in rows))


if __name__ == "__main__":
    main()
