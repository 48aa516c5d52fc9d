"""The tiny SDXL of the tests in ComfyUI's own class, and the golden numbers through it and the nodes."""

from __future__ import annotations

import comfy.model_patcher
import pytest
import torch

from devkit.host import golden
from devkit.host.sampling import golden_adm, predict
from devkit.host.tiny_nodes.tiny_sdxl import TinyVAE, random_conditioning


def test_tokens_of_both_sides_are_the_authors(easy) -> None:
    for side, tokens in (("cond", easy.tokens.conditional), ("uncond", easy.tokens.unconditional)):
        assert golden.error(tokens, golden.expected()[f"{side}.reference_embeds"]) <= 1e-5


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0])
def test_noise_prediction_is_the_authors(easy, model, weight: float | None) -> None:
    """Of the unpatched UNet too, against the same weights in diffusers."""
    name, patched = ("base", model) if weight is None else (f"scale_{weight}", easy.apply(model, weight))
    assert golden.error(predict(patched), golden.expected()[f"unet.noise_pred.{name}"]) <= 1e-5


def test_sizes_are_embedded_as_in_diffusers(model):
    height, width = golden.expected()["unet.time_ids"][0, :2].int().tolist()
    text = golden.expected()["unet.text_embeds"]
    y = model.model.encode_adm(pooled_output=text, height=height, width=width)
    torch.testing.assert_close(y, golden_adm())


def test_host_wraps_it_in_its_own_patcher(model):
    assert type(model) is comfy.model_patcher.CoreModelPatcher


def test_conditioning_depends_on_the_seed_alone():
    (first, extra), (again, _) = random_conditioning(5, 77)[0], random_conditioning(5, 77)[0]
    assert first.shape == (1, 77, 32)
    assert extra["pooled_output"].shape == (1, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, random_conditioning(6, 77)[0][0])


def test_vae_decodes_to_images_eight_times_as_large(model):
    images = TinyVAE(model.model.latent_format).decode(torch.randn(2, 4, 3, 5))
    assert images.shape == (2, 24, 40, 3)
    assert images.min() >= 0
    assert images.max() <= 1
