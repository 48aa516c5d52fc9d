"""What the machine is that figures were taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "diffusers", "safetensors")


def describe() -> dict[str, str]:
    """{what: how it is}, for the head of a report."""
    found = {
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "load when it began": f"{os.getloadavg()[0]:.1f} running" if hasattr(os, "getloadavg") else "unknown",
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    found |= {package: _version(package) for package in PACKAGES}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found[f"GPU {number}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory() -> str:
    total, free = (_bytes(name) for name in ("MemTotal", "MemAvailable"))
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} available" if total and free else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    return _bytes("MemAvailable")


def _bytes(name: str) -> int | None:
    """A field of Linux's /proc/meminfo."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":") for line in info.read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024
