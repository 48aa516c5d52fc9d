"""The ComfyUI that the kinds of nodes run in, with folders of their own."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import find_hosts

from .cases import Skipped

FOLDERS = ("input", "output", "temp")


@cache
def pack() -> ModuleType:
    """This pack inside a ComfyUI in this process; raises Skipped where there is none."""
    hosts = find_hosts()
    if not hosts:
        raise Skipped("no ComfyUI found: set COMFYUI_PATH to a checkout, or put one at ~/comfy/ComfyUI")
    from devkit.host.in_process import enter_host, load_pack

    complete_cpu_torch()
    enter_host(hosts[0])
    return load_pack()


def part(name: str) -> ModuleType:
    """A module of the pack, such as nodes.apply."""
    return importlib.import_module(f"{pack().__name__}.{name}")


def use_folders(base: Path) -> None:
    """Give the host folders of its own under `base`."""
    part("nodes")
    import folder_paths

    for name in FOLDERS:
        (base / name).mkdir()
        setattr(folder_paths, f"{name}_directory", str(base / name))
    models = base / "models"
    for name in ("easyref", "LLM", "text_encoders"):
        (models / name).mkdir(parents=True)
    folder_paths.models_dir = str(models)
    encoders = [str(models / "text_encoders")], folder_paths.supported_pt_extensions
    folder_paths.folder_names_and_paths = {"text_encoders": encoders}
    folder_paths.filename_list_cache = {}
    part("nodes.host.folders").register_folders()


def nodes() -> dict[str, Any]:
    """{node id: class} of every node of the pack."""
    import asyncio

    extension = asyncio.run(part("nodes").comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def given(output: Any) -> tuple:
    """What a node gives to the next."""
    return output.result or ()
