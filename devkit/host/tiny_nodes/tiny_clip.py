"""A tiny random model in the host's CLIP vision class."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import torch

CONFIG = {
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": 16,
}


def load_tiny_clip_vision() -> comfy.clip_vision.ClipVisionModel:
    """Return a CLIP_VISION of 28 x 28 pixels with fixed random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIG))
        clip = comfy.clip_vision.ClipVisionModel(str(path))
    random = torch.Generator().manual_seed(0)
    weights = clip.model.state_dict()
    for name, weight in weights.items():
        if "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones_like(weight)
        elif weight.is_floating_point():
            weights[name] = (torch.randn(weight.shape, generator=random) / 8).to(weight.dtype)
    clip.load_sd(weights)
    return clip
