"""The tiny base model that most tests here start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from easyref_core.training.base_model import BaseModel

from . import tiny

torch.set_num_threads(1)  # in models this small, threads only wait for each other


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random diffusers SDXL folder. Shared: nobody writes into it."""
    return tiny.make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def base(base_folder: Path) -> BaseModel:
    """The tiny base model, the test's own."""
    return BaseModel.load(base_folder)
