"""Denoising objective of a base model's noise schedule: epsilon, v-prediction or sample; and its sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, EulerDiscreteScheduler
    from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def require_known(schedule: DDPMScheduler) -> None:
    """Raise ValueError for a schedule whose prediction type is unknown, or cannot be learned from pure noise.

    With zero terminal SNR the last timestep is pure noise, of which a predicted noise says nothing about the
    image.
    """
    kind = schedule.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"The base's prediction_type is {kind!r}, expected one of {', '.join(PREDICTION_TYPES)}. Set it "
            "in the base's scheduler/scheduler_config.json."
        )
    if kind == "epsilon" and schedule.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "The base has rescale_betas_zero_snr with prediction_type 'epsilon', expected 'v_prediction' or "
            "'sample'. Set prediction_type in the base's scheduler/scheduler_config.json."
        )


def denoising_loss(
    schedule: DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    predict: Callable[[Tensor], Tensor],
) -> Tensor:
    """Mean squared error of what the base predicts, over latents and noise (B, 4, h, w), timesteps (B,).

    predict: noisy latents (B, 4, h, w) -> prediction of that shape.
    """
    predicted = predict(schedule.add_noise(latents, noise, timesteps))
    expected = target(schedule, latents, noise, timesteps)
    return torch.nn.functional.mse_loss(predicted.float(), expected)


def target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The right prediction (B, 4, h, w): the noise, the velocity, or the latents.

    The velocity is sqrt(a) noise - sqrt(1 - a) latents, with a the schedule's alphas_cumprod at
    `timesteps` (B,).
    """
    kind = schedule.config.prediction_type
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return latents if kind == "sample" else noise


def sampler(schedule: DDPMScheduler) -> EulerDiscreteScheduler:
    """Euler sampler of the same betas and prediction type.

    With zero terminal SNR the first timestep must be the last of training, which only trailing spacing gives
    (arXiv 2305.08891, section 3.3): any other starts from pure noise at a timestep that was trained on less.
    """
    from diffusers import EulerDiscreteScheduler

    zero_snr = schedule.config.get("rescale_betas_zero_snr")
    spacing = {"timestep_spacing": "trailing"} if zero_snr else {}
    return EulerDiscreteScheduler.from_config(schedule.config, **spacing)
