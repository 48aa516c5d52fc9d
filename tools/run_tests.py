"""Run ruff, all tests in the first ComfyUI found, and the version-dependent tests in each further one.

pytest-xdist spreads the files over the cores; each worker computes with one thread. Without a ComfyUI, the
tests in tests/host are skipped. `--all` also runs the tests marked one_host in every ComfyUI. Other arguments
go to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.hosts import ROOT, find_hosts, host_version


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
    parsed, options = parser.parse_known_args()
    pytest = ["pytest", "--numprocesses=auto", "--dist=loadfile", "--no-loadscope-reorder", "-q", *options]
    first, *others = find_hosts() or [None]

    passed = [run("ruff check", "ruff", "check", "."), run("ruff format", "ruff", "format", "--check", ".")]
    name = f"ComfyUI {host_version(first)}" if first else "no ComfyUI found: host tests are skipped"
    passed.append(run(f"all tests, {name}", *pytest, "tests", host=first))
    chosen = [] if parsed.all else ["-m", "not one_host"]
    for host in others:
        title = f"tests/host, ComfyUI {host_version(host)}" + ("" if parsed.all else ", without one_host")
        passed.append(run(title, *pytest, *chosen, "tests/host", host=host))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
