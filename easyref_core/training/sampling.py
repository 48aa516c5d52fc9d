"""Image generation by Euler sampling with CFG, and conversion of tensors and patches to PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ..mllm.preprocess import CLIP_MEAN, CLIP_STD
from .base_model import Text
from .objective import sampler

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from .base_model import BaseModel


@torch.no_grad()
def generate_images(
    base: BaseModel,
    noise: Tensor,
    prompts: Sequence[str],
    negative: str = "",
    guidance: float = 5.0,
    steps: int = 30,
    size: tuple[int, int] | None = None,
) -> list[Image.Image]:
    """Generate one image from each noise (B, C, h, w) and prompt; the arguments are `generate_latents`'."""
    return to_images(
        base.decode(generate_latents(base, noise, prompts, negative, guidance, steps=steps, size=size))
    )


@torch.no_grad()
def generate_latents(
    base: BaseModel,
    noise: Tensor,
    prompts: Sequence[str],
    negative: str = "",
    guidance: float = 5.0,
    steps: int = 30,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Denoise one latent (B, C, h, w) float32 from each noise of that shape and prompt; C is 4 in SDXL.

    Every UNet batch is [unconditional rows, conditional rows]. To condition on references, attach them to
    base.unet first (easyref_core.unet.diffusers_unet). size: height and width of SDXL's size conditioning;
    None takes the noise's own.
    """
    schedule = sampler(base.schedule)
    schedule.set_timesteps(steps, device=base.device)
    text = Text.cat([base.encode_text([negative] * len(prompts)), base.encode_text(prompts)])
    dtype = base.unet.dtype  # diffusers searches all modules for it
    size = size or tuple(side * base.vae_scale_factor for side in noise.shape[-2:])
    sizes = {
        "text_embeds": text.pooled.to(dtype),
        "time_ids": base.time_ids(size, (0, 0), size, batch=2 * len(prompts)),
    }
    states = text.states.to(dtype)
    latents = noise.to(base.device, torch.float32) * schedule.init_noise_sigma
    for timestep in schedule.timesteps:
        inputs = schedule.scale_model_input(torch.cat([latents, latents]), timestep).to(dtype)
        predicted = base.unet(inputs, timestep, states, added_cond_kwargs=sizes, return_dict=False)[0]
        unconditional, conditional = predicted.float().chunk(2)
        predicted = unconditional + guidance * (conditional - unconditional)
        latents = schedule.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def to_images(images: Tensor) -> list[Image.Image]:
    """Convert images (B, 3, H, W) in 0..1 to PIL images."""
    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(image) for image in rearrange(pixels, "b c h w -> b h w c").numpy()]


def unpatchify(patches: Tensor, grid: Tensor, config: EasyRefConfig) -> list[Image.Image]:
    """Invert preprocess.patchify: patches (sum, 1176) and grid (K, 3) -> references at the MLLM's size."""
    images = []
    sizes = {"ph": config.patch_size, "pw": config.patch_size, "t": config.temporal_patch_size}
    sizes |= {"mh": config.merge_size, "mw": config.merge_size}
    parts = patches.cpu().split(grid.prod(dim=1).tolist())
    for reference, rows in zip(parts, grid[:, 1].tolist(), strict=True):
        pattern = "(h w mh mw) (c t ph pw) -> t (h mh ph) (w mw pw) c"
        frames = rearrange(reference, pattern, h=rows // config.merge_size, **sizes)
        pixels = frames[0].numpy() * CLIP_STD + CLIP_MEAN
        images.append(Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)))
    return images
