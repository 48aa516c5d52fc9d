"""The pretraining of the tiny SDXL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from easyref_core.tiny.optimizer import Log, Training
from easyref_core.tiny.sdxl import create_sdxl, encode_dataset, pretrain_sdxl
from easyref_core.tiny.vae import CONFIG
from easyref_core.training.base_model import BaseModel

CAPTIONS = ("a red thing on sand", "a blue thing on water")


def pretrain(folder: Path, steps: int, log: Log = print) -> None:
    """Create a base and pretrain it on random latents."""
    from diffusers import AutoencoderKL

    AutoencoderKL(**CONFIG).save_pretrained(folder / "vae")
    create_sdxl(folder, seed=0)
    latents = torch.randn(4, CONFIG["latent_channels"], 8, 8, generator=torch.Generator().manual_seed(0))
    training = Training(steps=steps, batch=2, lr=1e-3, seed=0)

    def draw_caption(index: int, generator: np.random.Generator) -> str:
        return CAPTIONS[generator.integers(2)]

    pretrain_sdxl(latents, draw_caption, folder, training, training, log)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base after two updates."""
    folder = tmp_path_factory.mktemp("base")
    pretrain(folder, steps=2)
    return BaseModel.load(folder)


def test_an_interrupted_training_of_the_unet_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "logs", lambda training, step: step % 3 == 0)
    pretrain(tmp_path / "whole", steps=5)

    def interrupt(line: str) -> None:
        if line.startswith("SDXL 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "interrupted", 5, interrupt)
    lines: list[str] = []
    pretrain(tmp_path / "interrupted", 5, lines.append)
    assert [line.split(":")[0] for line in lines] == ["SDXL 3"]
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (whole,) = (tmp_path / "whole" / part).glob("*.safetensors")
        assert (tmp_path / "interrupted" / part / whole.name).read_bytes() == whole.read_bytes()
    assert not list(tmp_path.rglob("*.state"))


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
