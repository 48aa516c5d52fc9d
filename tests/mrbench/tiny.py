"""The tiny random models of tests/training, and a random image encoder and IP-Adapters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from easyref_core.mrbench.methods.ip_adapter_training import initial_adapter, save_adapter
from easyref_core.training.base_model import BaseModel

from ..training.tiny import IMAGE_SIZE, MLLM, REFERENCE, make_base, random_image
from .benchmarks import LAYERS

__all__ = ["CHECKPOINT", "ENTRIES", "IMAGE_SIZE", "MLLM", "REFERENCE", "make_base", "random_image"]

WIDTH, PROJECTION = LAYERS["hidden_size"], 12  # of the image encoder, that of benchmarks.write_clip
CHECKPOINT = MLLM.parent / "easyref.safetensors"
EASYREF = {"kind": "easyref", "checkpoint": str(CHECKPOINT), "mllm": str(MLLM), "size": REFERENCE}
ENTRIES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "easyref": {**EASYREF, "tokens": 8, "final_layers": 1},
    "easyref_average": {**EASYREF, "aggregation": "average"},
    "easyref_concatenation": {**EASYREF, "aggregation": "concatenation"},
    "ip_adapter_average": {"kind": "ip_adapter"},
    "ip_adapter_concatenation": {"kind": "ip_adapter", "embeddings": "concatenation"},
    "ip_adapter_plus": {"kind": "ip_adapter"},
    "lora": {"kind": "lora", "size": IMAGE_SIZE, "rank": 2, "steps": 2, "lr": 1e-2, "batch": 2},
}


def make_adapter(base: BaseModel, file: Path) -> Path:
    """A random IP-Adapter for the base and that encoder."""
    torch.manual_seed(2)
    save_adapter(initial_adapter(base.unet, PROJECTION), file)
    return file


def make_plus_adapter(base: BaseModel, file: Path) -> Path:
    """A random "plus" IP-Adapter: a resampler of the encoder's last but one hidden states, two tokens."""
    torch.manual_seed(3)
    inner, context = 64, base.unet.config.cross_attention_dim
    sizes = {"latents": (1, 2, WIDTH), "proj_in.weight": (WIDTH, WIDTH), "proj_in.bias": (WIDTH,)}
    sizes |= {"proj_out.weight": (context, WIDTH), "proj_out.bias": (context,)}
    norms = {"norm_out": context}
    for i in range(4):  # the only number that diffusers' loader supports
        sizes |= {
            f"layers.{i}.0.to_q.weight": (inner, WIDTH),
            f"layers.{i}.0.to_kv.weight": (2 * inner, WIDTH),
            f"layers.{i}.0.to_out.weight": (WIDTH, inner),
            f"layers.{i}.1.1.weight": (4 * WIDTH, WIDTH),
            f"layers.{i}.1.3.weight": (WIDTH, 4 * WIDTH),
        }
        norms |= {f"layers.{i}.{name}": WIDTH for name in ("0.norm1", "0.norm2", "1.0")}
    projection = {name: torch.randn(size) / 8 for name, size in sizes.items()}
    projection |= {f"{name}.weight": torch.ones(width) for name, width in norms.items()}
    projection |= {f"{name}.bias": torch.zeros(width) for name, width in norms.items()}
    layers = initial_adapter(base.unet, PROJECTION)["ip_adapter"]
    save_adapter({"image_proj": projection, "ip_adapter": layers}, file)
    return file


class OneImage:
    """Training data of one image and one prompt, with another seed in every row."""

    def __init__(self, latents: bool = False) -> None:
        pixels = torch.from_numpy(np.array(random_image(1))).permute(2, 0, 1) / 127.5 - 1
        self.pixels = None if latents else pixels

    def batch(self, positions: range) -> SimpleNamespace:
        n = len(positions)
        return SimpleNamespace(
            pixels=None if self.pixels is None else self.pixels.expand(n, -1, -1, -1),
            latents=torch.zeros(n, 4, 4, 4) if self.pixels is None else None,
            prompts=("a cat",) * n,
            time_ids=torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]] * n).float(),
            seeds=torch.tensor([7 + position % 4 for position in positions]),
        )
