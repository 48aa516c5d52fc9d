"""Contents of pyproject.toml."""

from __future__ import annotations

from typing import Any

from devkit.hosts import ROOT

try:
    import tomllib
except ModuleNotFoundError:
    # Python 3.10; tools/setup_env.py runs before anything is installed, and pip comes with venv
    from pip._vendor import tomli as tomllib


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
