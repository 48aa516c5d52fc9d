"""Fixtures of the training tests: a tiny base model, its examples, and settings of a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.test_utils.testing import AccelerateTestCase

from easyref_core.training.base_model import BaseModel
from easyref_core.training.loop import train

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
def settings(base_folder: Path, tmp_path: Path) -> tiny.MakeSettings:
    """Factory of settings of a tiny run in tmp_path."""
    return lambda **changes: tiny.settings(base_folder, **{"output": tmp_path} | changes)


@pytest.fixture
def train_tiny(settings: tiny.MakeSettings, examples: tiny.TinyExamples) -> tiny.Train:
    """Train with `settings` and return the checkpoint."""
    return lambda **changes: train(settings(**changes), examples)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of accelerate launch --mixed_precision bf16."""
    reset_accelerator = AccelerateTestCase().tearDown
    reset_accelerator()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    reset_accelerator()
