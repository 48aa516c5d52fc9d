"""diffusers' AutoencoderKL as the host's own VAE, at the sizes of its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import nn

from .tiny_sdxl import config_of, weights_of


def load_vae(base: Path) -> comfy.sd.VAE:
    """The VAE of a diffusers SDXL folder, in float32."""
    config = config_of(base / "vae")
    params = host_config(config)
    vae = comfy.sd.VAE(weights_of(base / "vae"), config={"params": params}, dtype=torch.float32)
    for norm in vae.first_stage_model.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = config["norm_num_groups"]  # the host makes 32 in every norm
    return vae


def host_config(diffusers: dict[str, Any]) -> dict[str, Any]:
    """The host's configuration of an autoencoder that diffusers' config.json describes; widths in multiples of 32."""
    widths = diffusers["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": diffusers["latent_channels"],
        "resolution": diffusers["sample_size"],
        "in_channels": diffusers["in_channels"],
        "out_ch": diffusers["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": diffusers["layers_per_block"],
        "attn_resolutions": [],
    }
    return {"embed_dim": diffusers["latent_channels"], "ddconfig": sizes}
