"""The ComfyUI checkouts that the tests and the demo run in, and the folders of their own packages."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_HOST = Path.home() / "comfy" / "ComfyUI"


def is_host(folder: Path) -> bool:
    """True if `folder` is a ComfyUI checkout."""
    return (folder / "main.py").is_file() and (folder / "comfyui_version.py").is_file()


def find_hosts() -> list[Path]:
    """The ComfyUI checkouts to use, the main one first; none if COMFYUI_PATH is empty.

    If COMFYUI_PATH is set, only its folders (separated as in PATH). Otherwise
    ~/comfy/ComfyUI and its siblings ~/comfy/ComfyUI-*, otherwise the ComfyUI this pack is installed in.
    """
    if (named := os.environ.get("COMFYUI_PATH")) is not None:
        return [_checked(Path(part).expanduser().resolve()) for part in named.split(os.pathsep) if part]

    usual = [DEFAULT_HOST, *sorted(DEFAULT_HOST.parent.glob(f"{DEFAULT_HOST.name}-*"))]
    if hosts := [folder for folder in usual if is_host(folder)]:
        return hosts

    around = ROOT.parent.parent
    return [around] if ROOT.parent.name == "custom_nodes" and is_host(around) else []


def host_version(host: Path) -> str:
    """Version of a ComfyUI checkout, such as "0.33.0"."""
    return runpy.run_path(str(host / "comfyui_version.py"))["__version__"]


def overlay(host: Path) -> Path:
    """The folder with the packages that this host pins to other versions than .venv has; may not exist."""
    return ROOT / ".venv" / "hosts" / host_version(host)


def _checked(folder: Path) -> Path:
    if not is_host(folder):
        raise FileNotFoundError(
            f"COMFYUI_PATH names {folder}, which is not a ComfyUI checkout (it has no main.py and "
            "comfyui_version.py): name the folder that ComfyUI is started from"
        )
    return folder
