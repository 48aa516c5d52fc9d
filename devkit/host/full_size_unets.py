"""Full-size UNets of SDXL and of other architectures, in the host's classes and on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

CONFIGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
for config in CONFIGS.values():
    config["dtype"] = getattr(torch, config["dtype"])
SDXL, SSD_1B, REFINER, SD15, FLUX = (CONFIGS[name] for name in "SDXL SSD_1B REFINER SD15 FLUX".split())


def on_meta(unet_config: dict[str, Any], load_device: str = "cpu") -> ModelPatcher:
    """The model that ComfyUI detects from this config; an SDXL if it detects none.

    load_device: where the host runs it.
    """
    known = comfy.model_detection.model_config_from_unet_config(unet_config)
    config = known or comfy.supported_models.SDXL(unet_config)
    model = config.get_model({}, device="meta")
    return comfy.model_patcher.ModelPatcher(
        model, load_device=torch.device(load_device), offload_device="cpu"
    )
