"""A real ComfyUI, imported into this process, and the pack loaded into it as ComfyUI loads it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from devkit.hosts import ROOT, overlay


def enter_host(host: Path, cpu: bool = True) -> None:
    """Put a ComfyUI on sys.path, by default on the CPU, so that its numbers can be compared.

    The host comes first, because this pack has a `nodes` folder and the host a nodes.py.
    """
    sys.path[:0] = [str(host), str(overlay(host))]
    # before any test imports the host's nodes.py, which puts comfy/ with a utils.py of its own before it
    importlib.import_module("utils.extra_config")
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu  # read when comfy.model_management is imported


def load_pack() -> ModuleType:
    """This pack, loaded from its folder under the name that ComfyUI gives it."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
