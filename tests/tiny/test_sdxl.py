"""The pretraining of the tiny SDXL."""

from __future__ import annotations

import pytest
import torch

from easyref_core.tiny.optimizer import Training
from easyref_core.tiny.sdxl import create_sdxl, pretrain_sdxl
from easyref_core.tiny.vae import CONFIG
from easyref_core.training.base_model import BaseModel

CAPTIONS = ("a red thing on sand", "a blue thing on water")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base after two updates, on random latents."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("base")
    AutoencoderKL(**CONFIG).save_pretrained(folder / "vae")
    create_sdxl(folder, seed=0)
    torch.manual_seed(0)
    latents = torch.randn(4, CONFIG["latent_channels"], 8, 8)
    training = Training(steps=2, batch=2, lr=1e-3, seed=0)
    pretrain_sdxl(latents, lambda index, _: CAPTIONS[index % 2], folder, training, training, print)
    return BaseModel.load(folder)


def test_captions_reach_the_unet_through_its_cross_attention_only(base: BaseModel) -> None:
    """Reference tokens are a part of the cross-attention, and pooled embeddings are not."""
    text = base.encode_text(list(CAPTIONS))
    assert (text.pooled == 0).all()
    assert (text.states[0] - text.states[1]).std() > 0.1
