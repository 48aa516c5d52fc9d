"""The tiny AutoencoderKL: 64 x 64 pixels <-> latents (4, 8, 8)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .optimizer import Log, OneCycleAdamW, Training

CONFIG = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
KL_WEIGHT = 1e-3
EDGE_WEIGHT = 1.0  # of the error of differences between neighbouring pixels; without it, edges stay soft
CROP = 32  # pixels; training is mostly on crops, four of which cost as much as an image
FULL_IMAGES = 0.15  # last fraction of the training, on images without crops


def pretrain_vae(
    pixels: Tensor,
    folder: Path,
    training: Training,
    log: Log,
    *,
    config: Mapping[str, Any] = CONFIG,
    kl_weight: float = KL_WEIGHT,
) -> None:
    """Train on images (M, 3, 64, 64) in -1..1 and save; `scaling_factor` gives latents of unit deviation."""
    from diffusers import AutoencoderKL

    torch.manual_seed(training.seed)
    vae = AutoencoderKL(**config).train()
    optimizer = OneCycleAdamW(vae.parameters(), training, weight_decay=0.0, warmup=0.05)
    for step in range(training.steps):
        if step < (1 - FULL_IMAGES) * training.steps:
            inputs = _crops(pixels, training.batch)
        else:
            inputs = _images(pixels, training.batch // 4)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(inputs).latent_dist
            outputs = vae.decode(posterior.sample()).sample
        outputs = outputs.float()
        error = (outputs - inputs).abs().mean() + EDGE_WEIGHT * edge_error(outputs, inputs)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.step(error + kl_weight * kl)
        if training.logs(step):
            log(f"VAE {step}: error {error.item():.4f}, KL {kl.item():.2f}")
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels[:1024].split(128)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.half().save_pretrained(folder)


@torch.no_grad()
def reconstruct(folder: Path, pixels: Tensor) -> Tensor:
    """Encode and decode images (N, 3, 64, 64) in -1..1 with the VAE in a folder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(256)]
    return torch.cat(parts).clamp(-1, 1)


def edge_error(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Mean absolute error of horizontal and vertical differences of images (N, 3, H, W)."""
    return sum((outputs.diff(dim=dim) - inputs.diff(dim=dim)).abs().mean() for dim in (2, 3))


def _images(pixels: Tensor, count: int) -> Tensor:
    return pixels[torch.randint(len(pixels), (count,))]


def _crops(pixels: Tensor, count: int) -> Tensor:
    """Draw crops (count, 3, 32, 32) that are aligned with the latent grid, as the textures are."""
    offsets = range(0, pixels.shape[-1] - CROP + 1, 8)
    top, left = (offsets[int(torch.randint(len(offsets), ()))] for _ in range(2))
    return _images(pixels, count)[..., top : top + CROP, left : left + CROP]
