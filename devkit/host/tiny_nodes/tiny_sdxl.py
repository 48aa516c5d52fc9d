"""The tiny UNet of tests/golden/unet in ComfyUI's SDXL class, with matching conditionings and VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

UNET = (
    Path(__file__).resolve().parents[3] / "tests" / "golden" / "unet" / "diffusion_pytorch_model.safetensors"
)
POOLED_WIDTH = 32
TIME_ID_WIDTH = 8  # per time id, of which SDXL has six: 32 + 6 * 8 = 80 = adm_in_channels
SPREAD = 64  # standard deviation of the random UNet's colours, divided out so that no pixel saturates

UNET_CONFIG = json.loads(Path(__file__).with_suffix(".json").read_text()) | {"dtype": torch.float32}


class TinyConfig(comfy.supported_models.SDXL):
    """SDXL with the tiny UNet's attention heads."""

    unet_extra_config = {"num_heads": -1, "num_head_channels": 16}


class TinyModel(comfy.model_base.SDXL):
    """SDXL with image sizes embedded in the tiny UNet's width."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.embedder = Timestep(TIME_ID_WIDTH)


class TinyVAE:
    """Stand-in for a VAE: latents to colours by the host's preview factors, and roughly back."""

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat) -> None:
        self.to_rgb = torch.tensor(latent_format.latent_rgb_factors)
        self.bias = torch.tensor(latent_format.latent_rgb_factors_bias)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Decode (batch, 4, height, width) to images (batch, 8 height, 8 width, 3) in 0..1."""
        colours = samples.float().cpu().movedim(1, -1) @ self.to_rgb + self.bias
        return (colours / SPREAD).sigmoid().repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode (batch, 8 height, 8 width, 3) in 0..1 to latents (batch, 4, height, width)."""
        colours = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1).float(), 8).movedim(1, -1)
        spread = colours.clamp(0.01, 0.99).logit() * SPREAD - self.bias
        return (spread @ torch.linalg.pinv(self.to_rgb)).movedim(-1, 1)


def load_tiny_sdxl(dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """Load the tiny SDXL into a new ModelPatcher, as the host's own loaders do."""
    model = TinyModel(TinyConfig(UNET_CONFIG | {"dtype": dtype}))
    diffusers = comfy.utils.load_torch_file(str(UNET))
    names = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    model.diffusion_model.load_state_dict({names[name]: weight for name, weight in diffusers.items()})
    return _wrapped(model)


def random_sdxl(seed: int, **config: Any) -> comfy.model_patcher.ModelPatcher:
    """Return a UNet that differs from the tiny one in `config` (keys of UNET_CONFIG), with random weights."""
    model = TinyModel(TinyConfig(UNET_CONFIG | config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=random)
            else:  # scales and offsets; their values do not matter, but they must be initialised
                weight.fill_(1)
    return _wrapped(model)


def _wrapped(model: TinyModel) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def random_conditioning(seed: int, tokens: int) -> list:
    """Return a random CONDITIONING with this number of tokens."""
    random = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, UNET_CONFIG["context_dim"], generator=random)
    pooled = torch.randn(1, POOLED_WIDTH, generator=random)
    return [[context, {"pooled_output": pooled}]]


def random_controlnet(seed: int) -> comfy.controlnet.ControlNet:
    """Return a ControlNet for the tiny SDXL, with random weights."""
    config = {k: v for k, v in UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(
        hint_channels=3, num_head_channels=16, operations=comfy.ops.manual_cast, **config
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(std=0.05, generator=random)
    return comfy.controlnet.ControlNet(net, load_device=comfy.model_management.get_torch_device())
