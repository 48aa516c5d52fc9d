"""The pretraining of the tiny SDXL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from easyref_core.tiny.optimizer import Training
from easyref_core.tiny.sdxl import create_sdxl, encode_dataset, pretrain_sdxl
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


def test_a_dataset_is_encoded_once_for_each_vae(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, encode_images = [], BaseModel.encode_images

    def counted(model: BaseModel, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return encode_images(model, pixels)

    monkeypatch.setattr(BaseModel, "encode_images", counted)
    images = np.random.default_rng(0).integers(256, size=(20, 64, 64, 3), dtype=np.uint8)
    latents = encode_dataset(base, images)
    assert latents.shape == (20, CONFIG["latent_channels"], 8, 8)
    assert torch.equal(encode_dataset(base, images.copy()), latents)
    assert calls == [16, 4]
    assert not torch.equal(encode_dataset(base, 255 - images), latents)
    weight = base.vae.encoder.conv_in.weight
    monkeypatch.setattr(weight, "data", weight.data * 2)
    assert not torch.equal(encode_dataset(base, images), latents)
    assert calls == [16, 4] * 3
