"""UNet of a diffusers SDXL folder, of any size, in ComfyUI's own SDXL class.

All sizes come from the folder's config.json files, because the host only recognises SDXL at its full size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

from ...easyref_core.tiny.diffusers_folder import load_config, load_weights

# The host's names of the scheduler's prediction types that the tiny models have.
MODEL_TYPES = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}


class TinyLatents(comfy.latent_formats.LatentFormat):
    """Latents of the folder's own VAE; no live preview, because the host's factors are for SDXL's VAE."""

    def __init__(self, scale_factor: float, channels: int) -> None:
        self.scale_factor, self.latent_channels = scale_factor, channels


class TinyConfig(comfy.supported_models.SDXL):
    """SDXL with attention heads and latents of other sizes."""

    unet_extra_config = {}  # the host's default would set heads of 64 channels

    def __init__(self, unet_config: dict[str, Any], scale_factor: float) -> None:
        super().__init__(unet_config)
        self.latent_format = TinyLatents(scale_factor, unet_config["in_channels"])


class TinySDXL(comfy.model_base.SDXL):
    """SDXL with image sizes embedded in `time_id_width` channels each."""

    def __init__(
        self, config: TinyConfig, time_id_width: int, model_type: comfy.model_base.ModelType
    ) -> None:
        super().__init__(config, model_type)
        self.embedder = Timestep(time_id_width)


def load_model(base: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load the UNet of a diffusers SDXL folder into a ModelPatcher, as the host's own loaders do.

    disable_dynamic: load without the host's paging. Some host features reload the model so, by
    `cached_patcher_init`.
    """
    unet, vae = load_config(base / "unet"), load_config(base / "vae")
    config = TinyConfig(unet_config(unet), vae["scaling_factor"])
    prediction_type = load_config(base / "scheduler", "scheduler_config.json").get(
        "prediction_type", "epsilon"
    )
    model = TinySDXL(config, unet["addition_time_embed_dim"], MODEL_TYPES[prediction_type])
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = {names[name]: weight for name, weight in load_weights(base / "unet").items()}
    model.diffusion_model.load_state_dict(weights, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (base,))
    return patcher


def unet_config(diffusers: dict[str, Any]) -> dict[str, Any]:
    """Convert diffusers' config.json of a UNet to the host's configuration."""
    channels, resnets = diffusers["block_out_channels"], diffusers["layers_per_block"]
    depths = [
        depth if "CrossAttn" in kind else 0
        for depth, kind in zip(
            diffusers["transformer_layers_per_block"], diffusers["down_block_types"], strict=True
        )
    ]
    return {
        "image_size": diffusers["sample_size"],
        "in_channels": diffusers["in_channels"],
        "out_channels": diffusers["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [resnets] * len(channels),
        "num_classes": "sequential",
        "adm_in_channels": diffusers["projection_class_embeddings_input_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": diffusers["use_linear_projection"],
        "legacy": False,
        "transformer_depth": [depth for depth in depths for _ in range(resnets)],
        "transformer_depth_middle": diffusers["transformer_layers_per_block"][-1],
        "transformer_depth_output": [depth for depth in depths for _ in range(resnets + 1)],
        "context_dim": diffusers["cross_attention_dim"],
        "use_temporal_attention": False,
        "num_heads": -1,
        # what diffusers calls attention_head_dim is the number of heads
        "num_head_channels": channels[-1] // diffusers["attention_head_dim"][-1],
        "dtype": torch.float32,
    }
