"""VAE of a diffusers SDXL folder in the host's own VAE class, at the sizes of its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import nn

from ...easyref_core.tiny.diffusers_folder import load_config, load_weights


def load_vae(base: Path) -> comfy.sd.VAE:
    """Load the VAE of a diffusers SDXL folder, in float32."""
    config = load_config(base / "vae")
    params = host_config(config)
    vae = comfy.sd.VAE(load_weights(base / "vae"), config={"params": params}, dtype=torch.float32)
    for norm in vae.first_stage_model.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = config["norm_num_groups"]  # the host always sets 32
    vae.latent_channels = config["latent_channels"]  # the host's default is SDXL's
    return vae


def host_config(diffusers: dict[str, Any]) -> dict[str, Any]:
    """Convert diffusers' config.json of a VAE (widths in multiples of 32) to the host's configuration."""
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
