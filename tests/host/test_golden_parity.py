"""The golden tokens and noise predictions through the nodes, in ComfyUI's own SDXL class."""

from __future__ import annotations

import pytest
import torch

from devkit.host import golden
from devkit.host.sampling import predict
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl


@pytest.fixture(scope="module")
def easyref(pack):
    return golden.load(pack)


@pytest.fixture(scope="module")
def tokens(pack, easyref):
    with torch.inference_mode():
        return golden.tokens(pack, easyref)


def test_tokens_of_both_sides_are_the_authors(tokens) -> None:
    expected = golden.expected()
    assert golden.error(tokens.conditional, expected["cond.reference_embeds"]) <= 1e-5
    assert golden.error(tokens.unconditional, expected["uncond.reference_embeds"]) <= 1e-5


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_noise_prediction_is_the_authors(pack, easyref, tokens, weight: float) -> None:
    apply = golden.node(pack, "EasyRefApply")
    (patched,) = apply.execute(load_tiny_sdxl(), easyref, tokens, weight, 0.0, 1.0, 1.0).result
    assert golden.error(predict(patched), golden.expected()[f"unet.noise_pred.scale_{weight}"]) <= 1e-5
