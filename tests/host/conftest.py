"""Puts a real ComfyUI on sys.path for the tests of this folder; where there is none, each module is skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import find_hosts

HOST: Path | None = next(iter(find_hosts()), None)
NO_HOST = "no ComfyUI found: set COMFYUI_PATH to a checkout, or put one at ~/comfy/ComfyUI"


class NeedsHost(pytest.Module):
    """A test module that is not even imported, as its imports are the host's."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(NO_HOST, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HOST else NeedsHost.from_parent(parent, path=module_path)


if HOST:
    enter_host(HOST)


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """This pack, loaded from its folder as ComfyUI loads it."""
    return load_pack()


@pytest.fixture(scope="module")
def easy(pack: ModuleType) -> Any:
    """The golden EasyRef model and its tokens, in the host: a sampling.Easy."""
    from devkit.host.sampling import golden_easy

    return golden_easy(pack)


@pytest.fixture(scope="session")
def _loaded() -> Callable[..., Any]:
    from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl

    return functools.cache(load_tiny_sdxl)


@pytest.fixture
def model(request: pytest.FixtureRequest, _loaded: Callable[..., Any]) -> Any:
    """The tiny SDXL with nothing patched, a ModelPatcher; all tests of the session share its weights, as clones do.

    In float32, or where it is parametrized indirectly in the dtype asked for (sampling.in_float64).
    """
    import torch

    return _loaded(getattr(request, "param", torch.float32)).clone()


@pytest.fixture(scope="session")
def server() -> Iterator[object]:
    """A running ComfyServer (server.py) that all tests of the session share."""
    from devkit.host.server import ComfyServer

    with ComfyServer(HOST) as running:
        yield running
