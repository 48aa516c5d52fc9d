"""Tiny random models, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from easyref_core.mrbench.group_scores import Extractors
from easyref_core.mrbench.methods import Method, build
from easyref_core.mrbench.methods.ip_adapter import load_image_encoder
from easyref_core.training.base_model import BaseModel

from . import tiny
from .benchmarks import write_clip, write_dino

torch.set_num_threads(1)  # more threads slow down models this small


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny random SDXL. Shared: every test restores it, which is tested too."""
    return BaseModel.load(tiny.make_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def image_encoder(clip_folder: Path) -> nn.Module:
    return load_image_encoder(clip_folder)


@pytest.fixture(scope="session")
def entries(
    base: BaseModel, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """A config entry of every method, with its files."""
    folder = tmp_path_factory.mktemp("adapters")
    weights = str(tiny.make_adapter(base, folder / "ip_adapter.safetensors"))
    plus = str(tiny.make_plus_adapter(base, folder / "ip_adapter_plus.safetensors"))
    files = {
        name: {"weights": plus if name.endswith("plus") else weights, "image_encoder": str(clip_folder)}
        for name, entry in tiny.ENTRIES.items()
        if entry["kind"] == "ip_adapter"
    }
    return {name: entry | files.get(name, {}) for name, entry in tiny.ENTRIES.items()}


@pytest.fixture
def make_method(base: BaseModel, entries: dict[str, dict[str, Any]]) -> Callable[..., Method]:
    """Builds the method of an entry, with changes."""
    return lambda name, **changes: build(name, entries[name] | changes, base)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("models") / "tiny-dino")


@pytest.fixture(scope="session")
def extractors(clip_folder: Path, dino_folder: Path) -> Extractors:
    """Tiny CLIP and DINO, without a classifier."""
    from easyref_core.mrbench.extractors import Clip, Dino

    return Extractors(
        Clip(str(clip_folder), local_files_only=True), Dino(str(dino_folder), local_files_only=True)
    )
