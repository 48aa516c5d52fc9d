"""The pretraining of the tiny SDXL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from easyref_core.tiny.latents import encode_dataset
from easyref_core.tiny.optimizer import Log, Training
from easyref_core.tiny.sdxl import create_sdxl, pretrain_sdxl
from easyref_core.tiny.vae import CONFIG
from easyref_core.training.base_model import BaseModel

CAPTIONS = ("a red thing on sand", "a blue thing on water")


def pretrain(folder: Path, log: Log = print) -> None:
    """Create a base, and pretrain it on random latents in two updates."""
    from diffusers import AutoencoderKL

    AutoencoderKL(**CONFIG).save_pretrained(folder / "vae")
    create_sdxl(folder, seed=0)
    torch.manual_seed(0)
    latents = torch.randn(4, CONFIG["latent_channels"], 8, 8)
    training = Training(steps=2, batch=2, lr=1e-3, seed=0)

    def draw_caption(index: int, generator: np.random.Generator) -> str:
        return CAPTIONS[generator.integers(2)]

    pretrain_sdxl(latents, draw_caption, folder, training, training, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pretrain(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return BaseModel.load(folder)


def test_an_interrupted_training_of_the_unet_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("SDXL 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path, interrupt)
    lines: list[str] = []
    pretrain(tmp_path, lines.append)
    assert [line.split(":")[0] for line in lines] == ["SDXL 1"]
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (whole,) = (folder / part).glob("*.safetensors")
        assert (tmp_path / part / whole.name).read_bytes() == whole.read_bytes()
    assert not (tmp_path / "unet.state").exists()


def test_captions_reach_the_unet_through_its_cross_attention_only(base: BaseModel) -> None:
    """Reference tokens are a part of the cross-attention, and pooled embeddings are not."""
    text = base.encode_text(list(CAPTIONS))
    assert (text.pooled == 0).all()
    assert (text.states[0] - text.states[1]).std() > 0.1


def test_images_of_a_dataset_are_encoded_once_for_each_vae(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, encode_images = [], BaseModel.encode_images

    def counted(model: BaseModel, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return encode_images(model, pixels)

    monkeypatch.setattr(BaseModel, "encode_images", counted)
    images = np.random.default_rng(0).integers(256, size=(20, 64, 64, 3), dtype=np.uint8)
    latents = encode_dataset(base, images)
    assert (len(latents), calls) == (20, [])
    drawn = latents[[19, 16, 19]]
    assert (drawn.shape, calls) == ((3, CONFIG["latent_channels"], 8, 8), [4])
    whole = encode_dataset(base, images.copy())[range(20)]
    assert torch.equal(drawn, whole[[19, 16, 19]])
    assert calls == [4, 16]
    assert not torch.equal(encode_dataset(base, 255 - images)[range(20)], whole)
    weight = base.vae.encoder.conv_in.weight
    monkeypatch.setattr(weight, "data", weight.data * 2)
    assert not torch.equal(encode_dataset(base, images)[range(20)], whole)
    assert calls == [4, 16] + [16, 4] * 2
