"""Tiny random models, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from easyref_core.mrbench.methods.ip_adapter import load_image_encoder
from easyref_core.training.base_model import BaseModel

from . import tiny

if TYPE_CHECKING:
    from torch import nn

torch.set_num_threads(1)  # in models this small, threads only wait for each other


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny random SDXL. Shared: every test leaves it as it was, which is itself tested."""
    return BaseModel.load(tiny.make_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random image encoder's folder."""
    return str(tiny.make_image_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def image_encoder(encoder_folder: str) -> nn.Module:
    return load_image_encoder(encoder_folder)


@pytest.fixture(scope="session")
def entries(
    base: BaseModel, encoder_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """A config entry of every method, with the files it names."""
    folder = tmp_path_factory.mktemp("adapters")
    weights = str(tiny.make_adapter(base, folder / "ip_adapter.safetensors"))
    plus = str(tiny.make_plus_adapter(base, folder / "ip_adapter_plus.safetensors"))
    files = {
        name: {"weights": plus if name.endswith("plus") else weights, "image_encoder": encoder_folder}
        for name, entry in tiny.ENTRIES.items()
        if entry["kind"] == "ip_adapter"
    }
    return {name: entry | files.get(name, {}) for name, entry in tiny.ENTRIES.items()}
