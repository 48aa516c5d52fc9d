"""The tiny SDXL of the other tests computes, in the host, what the same weights compute in diffusers."""

from pathlib import Path

import comfy.model_patcher
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from safetensors.torch import load_file

from devkit.host.tiny_nodes.tiny_sdxl import TinyVAE, load_tiny_sdxl, random_conditioning

GOLDEN = Path(__file__).parents[1] / "golden" / "expected.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    prefix = "unet."
    return {name.removeprefix(prefix): t for name, t in load_file(GOLDEN).items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def patcher() -> comfy.model_patcher.ModelPatcher:
    return load_tiny_sdxl()


def sizes_and_text(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    time_ids = timestep_embedding(golden["time_ids"].flatten(), 8).reshape(2, 6 * 8)
    return torch.cat([golden["text_embeds"], time_ids], dim=1)


def test_noise_prediction_is_the_authors(patcher, golden):
    unet = patcher.model.diffusion_model
    with torch.inference_mode():
        out = unet(
            golden["sample"],
            golden["timestep"],
            context=golden["encoder_hidden_states"],
            y=sizes_and_text(golden),
        )

    expected = golden["noise_pred.base"]
    assert (out - expected).norm() / expected.norm() <= 1e-5


def test_sizes_are_embedded_as_in_diffusers(patcher, golden):
    height, width = golden["time_ids"][0, :2].int().tolist()
    y = patcher.model.encode_adm(pooled_output=golden["text_embeds"], height=height, width=width)
    torch.testing.assert_close(y, sizes_and_text(golden))


def test_host_wraps_it_in_its_own_patcher(patcher):
    assert type(patcher) is comfy.model_patcher.CoreModelPatcher


def test_conditioning_depends_on_the_seed_alone():
    (first, extra), (again, _) = random_conditioning(5, 77)[0], random_conditioning(5, 77)[0]
    assert first.shape == (1, 77, 32)
    assert extra["pooled_output"].shape == (1, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, random_conditioning(6, 77)[0][0])


def test_vae_decodes_to_images_eight_times_as_large(patcher):
    images = TinyVAE(patcher.model.latent_format).decode(torch.randn(2, 4, 3, 5))
    assert images.shape == (2, 24, 40, 3)
    assert images.min() >= 0
    assert images.max() <= 1
