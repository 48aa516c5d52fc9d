"""Runs the core tests (tests/core) on every Python and transformers, and prints a table.

    python tools/versions.py [--pythons 3.10 3.12] [--transformers "==4.50.3" ">=5"] [--folder FOLDER]

Makes one environment for each combination in --folder, which keeps them for the next time. A Python that is
not on this machine is named and left out. Torch and other packages that do not depend on transformers are
installed once for each Python; where the package index has torch for CUDA only, the CUDA libraries are
installed once for all. About 11 GB of disk, and 20 to 30 minutes on two cores.
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
COMMON = ("numpy", "pillow", "einops", "safetensors", "pytest>=8.3", "hypothesis>=6.100", "psutil")
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")
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
        """Create it; it also imports packages from the folders `also`."""
        if not self.folder.is_dir():
            run([interpreter, "-m", "venv", self.folder])
        lines = "".join(f"{folder}\n" for folder in also)
        (self.packages / "shared.pth").write_text(lines, encoding="utf-8")

    def install(self, *arguments: str | Path) -> None:
        run([self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def output_of(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def run(command: list[str | Path]) -> None:
    """Run a command in an empty folder; raises RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        output = (ended.stdout + ended.stderr)[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{output}")


def find_python(version: str) -> Path | None:
    """An interpreter of this version ("3.12"): the running one, on PATH, or uv's or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    if uv := shutil.which("uv"):
        candidates.append(output_of(uv, "python", "find", version))
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    # pyenv's shims exist for inactive versions too, so each candidate is run
    return next((Path(path) for path in candidates if path and output_of(path, "-c", ask) == version), None)


def torch_requirements(packages: Path) -> tuple[list[str], list[str]]:
    """Requirements of the torch in a folder: those of every build, and the CUDA libraries of a CUDA build."""
    (info,) = packages.glob("torch-*.dist-info")
    lines = [line for line in PathDistribution(info).requires or () if "extra ==" not in line]
    cuda = [line for line in lines if line.startswith(CUDA_PACKAGES)]
    is_cuda_build = runpy.run_path(str(packages / "torch" / "version.py"))["cuda"] is not None
    # bindings and compilers are for programs that call them
    libraries = [line for line in cuda if is_cuda_build and not line.startswith(("cuda-bindings", "triton"))]
    return [line for line in lines if line not in cuda], libraries


def with_torch(interpreter: Path, version: str, folder: Path) -> list[Path]:
    """The folders with torch for this Python, and the CUDA libraries if its import needs them."""
    libraries = folder / "cuda"
    environment = Environment(folder / f"python{version}")
    environment.make(interpreter, libraries)
    if not list(environment.packages.glob("torchvision-*.dist-info")):
        environment.install("--no-deps", TORCH, TORCHVISION)
    common, cuda = torch_requirements(environment.packages)
    environment.install(*common, *COMMON)
    if cuda and not libraries.is_dir():
        environment.install("--target", libraries, *cuda)
    return [environment.packages, libraries]


def run_tests(environment: Environment) -> Row:
    """Run tests/core; the counts, and the seconds it took."""
    log = environment.folder.with_name(f"{environment.folder.name}.log")
    variables = {"PYTHONPYCACHEPREFIX": str(environment.folder / "pycache"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        report, start = Path(folder) / "report.xml", time.monotonic()
        command = [str(environment.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core"]
        subprocess.run(
            [*command, f"--junitxml={report}"],
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


def check(interpreter: Path, version: str, transformers: str, folder: Path) -> Row:
    """One combination: make its environment, run the tests."""
    name = "".join(c if c.isalnum() or c == "." else "_" for c in transformers)
    environment = Environment(folder / f"python{version}-transformers{name}")
    try:
        environment.make(interpreter, *with_torch(interpreter, version, folder))
        environment.install(f"transformers{transformers}", "diffusers>=0.32")
    except RuntimeError as error:
        print(error, flush=True)
        return {"transformers": transformers, "failed": "not installed"}
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {SHOWN}}}))"
    return json.loads(output_of(environment.python, "-c", ask)) | run_tests(environment)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    columns = ("Python", *SHOWN, "passed", "failed", "skipped", "seconds")
    lines = [columns, ("---",) * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run every combination; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="such as 3.12")
    parser.add_argument("--transformers", nargs="+", default=TRANSFORMERS, help='such as "==4.57.*"')
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps the environments")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    for version in options.pythons:
        interpreter = find_python(version)
        if interpreter is None:
            rows.append({"Python": version, "failed": "not found on this machine"})
            continue
        for transformers in options.transformers:
            print(f"Python {version}, transformers{transformers}", flush=True)
            rows.append({"Python": version} | check(interpreter, version, transformers, folder))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    sys.exit(any(row["failed"] != "0" for row in rows))


if __name__ == "__main__":
    main()
