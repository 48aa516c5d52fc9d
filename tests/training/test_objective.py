"""The objective of every prediction type, by hand, in the runs and in sampling."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from easyref_core.training.base_model import BaseModel
from easyref_core.training.loop import make_accelerator
from easyref_core.training.objective import PREDICTION_TYPES, denoising_loss, sampler
from easyref_core.training.run import Run, randomness
from easyref_core.training.sampling import generate_latents

from . import tiny
from .tiny import TinyExamples

KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", True)]
SHAPE = (2, 4, 8, 8)


def with_schedule(base: BaseModel, **changes: Any) -> BaseModel:
    schedule = type(base.schedule).from_config(base.schedule.config, **changes)
    return dataclasses.replace(base, schedule=schedule)


def by_hand(kind: str, signal: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """The right prediction at alphas_cumprod `signal`."""
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    return {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]


@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
def test_loss_by_hand(base: BaseModel, kind: str, zero_snr: bool) -> None:
    schedule = with_schedule(base, prediction_type=kind, rescale_betas_zero_snr=zero_snr).schedule
    latents, noise, prediction = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([999, 300])
    signal = schedule.alphas_cumprod[timesteps][:, None, None, None]
    assert (signal[0].item() == 0) == zero_snr
    seen = []
    loss = denoising_loss(
        schedule, latents, noise, timesteps, lambda noisy: (seen.append(noisy), prediction)[1]
    )
    assert torch.allclose(seen[0], signal.sqrt() * latents + (1 - signal).sqrt() * noise)
    expected = (prediction - by_hand(kind, signal, latents, noise)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_epsilon_is_unchanged_to_the_bit(base: BaseModel) -> None:
    latents, noise, prediction = torch.randn(3, *SHAPE)
    loss = denoising_loss(base.schedule, latents, noise, torch.tensor([5, 999]), lambda _: prediction)
    assert torch.equal(loss, torch.nn.functional.mse_loss(prediction, noise))


class Oracle(torch.nn.Module):
    """A UNet that knows the clean latents and predicts exactly."""

    dtype = torch.float32

    def __init__(self, base: BaseModel, latents: Tensor) -> None:
        super().__init__()
        self.kind, self.latents = base.schedule.config.prediction_type, latents
        self.signal = sampler(base.schedule).alphas_cumprod  # where zero SNR has the sampler's 2^-24
        self.timesteps: list[int] = []

    def forward(self, noisy: Tensor, timestep: Tensor, *_: Any, **options: Any) -> tuple[Tensor]:
        self.timesteps.append(int(timestep))
        signal, latents = self.signal[int(timestep)], torch.cat([self.latents] * 2)
        noise = (noisy - signal.sqrt() * latents) / (1 - signal).sqrt()
        return (by_hand(self.kind, signal, latents, noise),)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
def test_sampling_with_an_exact_model_gives_its_latents(
    base: BaseModel, kind: str, zero_snr: bool, spacing: str
) -> None:
    options = {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr, "timestep_spacing": spacing}
    base = with_schedule(base, **options)
    latents, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    oracle = Oracle(base, latents)
    actual = generate_latents(dataclasses.replace(base, unet=oracle), noise, ["a", "b"], steps=5)
    assert torch.allclose(actual, latents, atol=2e-3)
    assert (oracle.timesteps[0] == 999) == (zero_snr or spacing == "trailing")


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_run_trains_what_the_base_predicts(
    base_folder: Path, tmp_path: Path, examples: TinyExamples, kind: str
) -> None:
    folder = with_config(base_folder, tmp_path / "base", {"prediction_type": kind})
    settings = tiny.settings(folder, output=tmp_path, **tiny.GOLDEN_START)
    run = Run(settings, make_accelerator(1), examples)
    torch.nn.init.zeros_(run.base.unet.conv_out.weight)
    torch.nn.init.zeros_(run.base.unet.conv_out.bias)
    batch = examples.batch(range(2))
    timesteps, noise, vae_noise = randomness(batch, run.base)
    signal = run.base.schedule.alphas_cumprod[timesteps][:, None, None, None]
    expected = by_hand(kind, signal, run.latents(batch, vae_noise), noise).square().mean()
    assert run.loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction_type": "flow"},
            "prediction_type is 'flow', expected one of epsilon, v_prediction, sam",
        ),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type 'epsilon', expected"),
    ],
)
def test_wrong_schedules_are_refused(
    base_folder: Path, tmp_path: Path, changes: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BaseModel.load(with_config(base_folder, tmp_path / "base", changes))


def with_config(base_folder: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of the base with changes to its scheduler's configuration."""
    shutil.copytree(base_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder
