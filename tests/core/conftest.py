"""The golden model and data that most tests here start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import easyref_core as er
from devkit import golden

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

torch.set_num_threads(1)  # in models this small, threads only wait for each other


@pytest.fixture(scope="session")
def expected() -> golden.Tensors:
    """Results of the authors' code."""
    return load_file(golden.GOLDEN / "expected.safetensors")


@pytest.fixture(scope="session")
def model() -> er.EasyRef:
    """The golden checkpoint, loaded. Shared: a test that changes its model loads its own."""
    return er.load(golden.CHECKPOINT, golden.MLLM)


@pytest.fixture(scope="session")
def context(model: er.EasyRef) -> er.ContextStates:
    """Context states of the golden group."""
    return model.encode(golden.references(), golden.PROMPT, size=golden.SIZE)


@pytest.fixture(scope="session")
def tokens(model: er.EasyRef, context: er.ContextStates) -> er.ReferenceTokens:
    """Reference tokens of the golden group."""
    return model.aggregate(context)


@pytest.fixture(scope="session")
def uncond(model: er.EasyRef) -> er.ReferenceTokens:
    """Reference tokens of the black image."""
    return model.unconditional(size=golden.SIZE)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """The tiny SDXL-shaped UNet, loaded for each test."""
    return golden.load_unet()
