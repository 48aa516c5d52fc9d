"""Fills .venv with what the tests and the demo need; does nothing where that has been done already.

Every ComfyUI found by devkit/hosts.py brings its own requirements. What two of them pin to different
versions goes into .venv for the first and into a folder of its own (`hosts.overlay`) for each other.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.hosts import ROOT, find_hosts, host_version, overlay
from devkit.project import pyproject

# One release of each, because torchvision is installed without its dependencies and must match torch.
TORCH, TORCHVISION = "torch==2.13.0", "torchvision==0.28.0"
TORCH_FAMILY = ("torch", "torchvision", "torchaudio")

VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def extras(name: str) -> list[str]:
    """The requirements of one extra in pyproject.toml, with those of the extras it includes."""
    project = pyproject()["project"]
    included = f"{project['name']}["
    lines: list[str] = []
    for line in project["optional-dependencies"][name]:
        lines += extras(line.removeprefix(included).rstrip("]")) if line.startswith(included) else [line]
    return lines


def host_requirements(host: Path) -> list[str]:
    """A ComfyUI checkout's own requirements, without the torch family, which is the same for all hosts."""
    lines = [
        line.partition("#")[0].strip()
        for line in (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and line not in TORCH_FAMILY]


def install(name: str, arguments: list[str]) -> None:
    """Run `pip install` with these arguments, unless it was run with the same ones before."""
    stamp = VENV / "stamps" / name
    wanted = "\n".join(arguments)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"setup: installing {name} (the first time this takes minutes)", flush=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, *arguments]).returncode:
        sys.exit(f"setup: pip could not install {name}: {' '.join(arguments)}; see pip's message above")
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(wanted, encoding="utf-8")


def main() -> None:
    """Create .venv, then install torch, the development tools and every host's requirements."""
    if not PYTHON.is_file():
        venv.create(VENV, with_pip=True)

    hosts = find_hosts()
    requirements = [host_requirements(host) for host in hosts]
    common = [
        line for rank, lines in enumerate(requirements) for line in lines if rank == 0 or "==" not in line
    ]
    install("torch and tools", [TORCH, *extras("dev"), *dict.fromkeys(common)])
    install("torchvision", ["--no-deps", TORCHVISION])
    for host, lines in list(zip(hosts, requirements, strict=True))[1:]:
        if own := [line for line in lines if line not in common]:
            install(
                f"ComfyUI {host_version(host)}",
                ["--upgrade", "--target", str(overlay(host)), "--no-deps", *own],
            )


if __name__ == "__main__":
    main()
