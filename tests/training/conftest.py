"""Fixtures of the training tests: a tiny base model, its examples, and settings of a tiny run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from easyref_core.training.base_model import BaseModel
from easyref_core.training.config import Settings

from . import tiny

torch.set_num_threads(1)  # models this small are slower with several threads


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random diffusers SDXL folder, read-only because it is shared."""
    return tiny.make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def base(base_folder: Path) -> BaseModel:
    return BaseModel.load(base_folder)


@pytest.fixture(scope="session")
def examples() -> tiny.TinyExamples:
    return tiny.TinyExamples(tiny.config())


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Factory of settings of a tiny run in tmp_path."""
    return lambda **changes: tiny.settings(base_folder, **{"output": tmp_path} | changes)
