"""Run ruff, pyrefly, all tests in the first ComfyUI found, and the version-dependent ones in each further.

pytest-xdist spreads the files over the cores; each worker computes with one thread. Without a ComfyUI, the
tests in tests/host are skipped. `--all` also runs the tests marked one_host in every ComfyUI. `--quick` runs
the fast tests of tests/core alone, for each commit. Other arguments go to pytest: `-p randomly` shuffles the
tests and prints the seed, which `--randomly-seed` repeats.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    """Run every check, also after one has failed, and exit with 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="run every host test in every ComfyUI")
    parser.add_argument("--quick", action="store_true", help="run the fast tests of tests/core alone")
    parsed, options = parser.parse_known_args()
    pytest = ["pytest", "--numprocesses=auto", "--dist=loadfile", "--no-loadscope-reorder", "-q", *options]
    passed = [
        run("ruff check", "ruff", "check", "."),
        run("ruff format", "ruff", "format", "--check", "."),
        run("types", "pyrefly", "check", "--python-interpreter-path", sys.executable),
    ]
    if parsed.quick:
        passed.append(run("the fast tests of tests/core", *pytest, *QUICK))
        sys.exit(not all(passed))

    first, *others = find_hosts() or [None]
    name = f"ComfyUI {host_version(first)}" if first else "no ComfyUI found: host tests are skipped"
    passed.append(run(f"all tests, {name}", *pytest, "tests", host=first))
    chosen = [] if parsed.all else ["-m", "not one_host"]
    for host in others:
        title = f"tests/host, ComfyUI {host_version(host)}" + ("" if parsed.all else ", without one_host")
        passed.append(run(title, *pytest, *chosen, "tests/host", host=host))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
