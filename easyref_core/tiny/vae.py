"""The tiny latent codec: an AutoencoderKL, 64 x 64 pixels <-> (4, 8, 8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

CONFIG = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}
KL_WEIGHT = 1e-3
CROP = 32  # pixels; most of the training sees crops, of which four cost what one picture does
WHOLE = 0.15  # the last part of the training sees whole pictures


def pretrain_codec(
    pixels: Tensor, folder: Path, steps: int, batch: int, lr: float, seed: int, log: Callable[[str], None]
) -> AutoencoderKL:
    """Train on pictures (M, 3, 64, 64) in -1..1 and save; `scaling_factor` makes the latents' deviation 1."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        shown = _crops(pixels, batch) if step < (1 - WHOLE) * steps else _pictures(pixels, batch // 4)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(shown).latent_dist
            drawn = vae.decode(posterior.sample()).sample
        away = (drawn.float() - shown).abs().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (away + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"codec {step}: L1 {away.item():.4f}, KL {kl.item():.2f}")
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels[:1024].split(128)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.half().save_pretrained(folder)
    return vae


def _pictures(pixels: Tensor, count: int) -> Tensor:
    return pixels[torch.randint(len(pixels), (count,))]


def _crops(pixels: Tensor, count: int) -> Tensor:
    """Crops (count, 3, 32, 32) that begin at a place of the latent grid, as the textures do."""
    places = range(0, pixels.shape[-1] - CROP + 1, 8)
    top, left = (places[int(torch.randint(len(places), ()))] for _ in range(2))
    return _pictures(pixels, count)[..., top : top + CROP, left : left + CROP]
