"""A tiny random model in the host's CLIP vision class."""

from __future__ import annotations

from pathlib import Path

import comfy.clip_vision
import torch

CONFIG = Path(__file__).with_suffix(".json")


def load_tiny_clip_vision() -> comfy.clip_vision.ClipVisionModel:
    """Return a CLIP_VISION of 28 x 28 pixels with fixed random weights."""
    clip = comfy.clip_vision.ClipVisionModel(str(CONFIG))
    random = torch.Generator().manual_seed(0)
    weights = clip.model.state_dict()
    for name, weight in weights.items():
        if "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones_like(weight)
        elif weight.is_floating_point():
            weights[name] = (torch.randn(weight.shape, generator=random) / 8).to(weight.dtype)
    clip.load_sd(weights)
    return clip
