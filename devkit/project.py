"""Contents of pyproject.toml, and the files of the registry's archive."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from devkit.hosts import ROOT

try:
    import tomllib
except ModuleNotFoundError:
    # Python 3.10; tools/setup_env.py runs before anything is installed, and pip comes with venv
    from pip._vendor import tomli as tomllib


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def archive_files() -> list[Path]:
    """The files that `comfy node pack` puts into the archive, relative to the repository.

    They are git's files without those of .comfyignore, which has the syntax of .gitignore.
    """
    left_out = _git_files("--cached", "--ignored", "--exclude-from=.comfyignore")
    return sorted(_git_files("--cached") - left_out)


def _git_files(*options: str) -> set[Path]:
    command = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    return {Path(name) for name in listed.split("\0") if name}
