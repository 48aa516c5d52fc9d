"""Puts a real ComfyUI on sys.path for the tests of this folder; without one, each module is skipped."""

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
    """A test module that is not even imported, because its imports are the host's."""

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


@pytest.fixture(scope="session")
def execute(pack: ModuleType) -> Callable[..., Any]:
    """Runs a node as the host runs it: execute(name, *inputs, **named) -> its NodeOutput."""
    from devkit.host.golden import execute

    return functools.partial(execute, pack)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of `folders`."""
    return tmp_path.resolve()


@pytest.fixture
def folders(pack: ModuleType, base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """nodes.host.folders in a host whose output, input, temp and models folders are new ones in `base`."""
    import folder_paths

    from devkit.host.golden import part

    for name in ("output", "input", "temp"):
        (base / name).mkdir(parents=True)
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(base / name))
    encoders = [str(base / "models" / "text_encoders")], folder_paths.supported_pt_extensions
    monkeypatch.setattr(folder_paths, "models_dir", str(base / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"text_encoders": encoders})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return part(pack, "nodes.host.folders")


@pytest.fixture(scope="module")
def easy(pack: ModuleType) -> Any:
    """The golden EasyRef model and its tokens, in the host: a sampling.Easy."""
    from devkit.host.sampling import golden_easy

    return golden_easy(pack)


@pytest.fixture(scope="session")
def load_shared() -> Callable[..., Any]:
    from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl

    return functools.cache(load_tiny_sdxl)


@pytest.fixture
def model(request: pytest.FixtureRequest, load_shared: Callable[..., Any]) -> Any:
    """The unpatched tiny SDXL, a ModelPatcher; all tests of the session share its weights, as clones do.

    In float32, or where it is parametrized indirectly in that dtype (sampling.in_float64).
    """
    import torch

    return load_shared(getattr(request, "param", torch.float32)).clone()


@pytest.fixture
def log(pack: ModuleType, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a process that has not logged any warning of the pack."""
    from devkit.host.golden import part

    part(pack, "nodes.host.log").warn_once.cache_clear()
    return caplog


@pytest.fixture
def torch_attention(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the attention that the host selects for a CPU, which reads the free memory, by PyTorch's.

    -> a function that replaces it by another one.
    """
    import comfy.ldm.modules.attention as host

    from devkit.host.golden import part

    def replace(attention: Callable[..., Any]) -> None:
        for module in (host, part(pack, "nodes.unet_patch.site_patch")):
            monkeypatch.setattr(module, "optimized_attention", attention)

    replace(host.attention_pytorch)
    return replace


@pytest.fixture(scope="module")
def opened(server: Any) -> Iterator[Any]:
    """The real frontend's page on the server, for all tests of a file."""
    from devkit.host import browser

    from . import tiny_workflow

    tiny_workflow.install(server)
    with browser.frontend(server) as page:
        yield page


@pytest.fixture(scope="session")
def server() -> Iterator[object]:
    """A running ComfyServer that all tests of the session share, with the golden model and references."""
    from devkit.host.graphs import install_golden
    from devkit.host.server import ComfyServer

    with ComfyServer(HOST) as running:
        install_golden(running)
        yield running
