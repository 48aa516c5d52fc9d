"""The golden tokens and noise predictions through the nodes, in ComfyUI's own SDXL class."""

from __future__ import annotations

import pytest

from devkit.host import golden
from devkit.host.sampling import golden_data, predict


def test_tokens_of_both_sides_are_the_authors(easy) -> None:
    for side, tokens in (("cond", easy.tokens.conditional), ("uncond", easy.tokens.unconditional)):
        assert golden.error(tokens, golden_data()[f"{side}.reference_embeds"]) <= 1e-5


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_noise_prediction_is_the_authors(easy, model, weight: float) -> None:
    expected = golden_data()[f"unet.noise_pred.scale_{weight}"]
    assert golden.error(predict(easy.apply(model, weight)), expected) <= 1e-5
