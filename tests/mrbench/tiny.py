"""What these tests paint with: the tiny random models of tests/training, and a random image encoder and adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from easyref_core.mrbench.methods import ip_adapter_training

from ..training.tiny import MLLM, PICTURE, REFERENCE, make_base, picture

if TYPE_CHECKING:
    from easyref_core.training.base_model import BaseModel

__all__ = ["CHECKPOINT", "ENTRIES", "MLLM", "PICTURE", "REFERENCE", "make_base", "picture"]

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
    "lora": {"kind": "lora", "size": PICTURE, "rank": 2, "steps": 2, "lr": 1e-2, "batch": 2},
}


def make_image_encoder(folder: Path) -> Path:
    """A random CLIP vision tower, 24 pixels wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def make_adapter(base: BaseModel, file: Path) -> Path:
    """A random IP-Adapter for the base and that encoder."""
    torch.manual_seed(2)
    ip_adapter_training.save_adapter(ip_adapter_training.initial_adapter(base.unet, 16), file)
    return file


def make_plus_adapter(base: BaseModel, file: Path) -> Path:
    """A random IP-Adapter of the "plus" kind: a resampler of the encoder's last but one hidden states, two tokens."""
    torch.manual_seed(3)
    wide, inner, context = 16, 64, base.unet.config.cross_attention_dim

    def tensors(sizes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        return {name: torch.randn(size) / 8 for name, size in sizes.items()}

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    projection = tensors(
        {
            "latents": (1, 2, wide),
            "proj_in.weight": (wide, wide),
            "proj_in.bias": (wide,),
            "proj_out.weight": (context, wide),
            "proj_out.bias": (context,),
        }
    )
    for i in range(4):  # diffusers' loader knows no other number
        projection |= tensors(
            {
                f"layers.{i}.0.to_q.weight": (inner, wide),
                f"layers.{i}.0.to_kv.weight": (2 * inner, wide),
                f"layers.{i}.0.to_out.weight": (wide, inner),
                f"layers.{i}.1.1.weight": (4 * wide, wide),
                f"layers.{i}.1.3.weight": (wide, 4 * wide),
            }
        )
        for name in ("0.norm1", "0.norm2", "1.0"):
            projection |= norm(f"layers.{i}.{name}", wide)
    projection |= norm("norm_out", context)
    layers = ip_adapter_training.initial_adapter(base.unet, 16)["ip_adapter"]
    ip_adapter_training.save_adapter({"image_proj": projection, "ip_adapter": layers}, file)
    return file


class OnePicture:
    """A source of one picture under one prompt, with another seed in every row."""

    def __init__(self, latents: bool = False) -> None:
        pixels = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1) / 127.5 - 1
        self.pixels = None if latents else pixels

    def batch(self, positions: range) -> SimpleNamespace:
        n = len(positions)
        return SimpleNamespace(
            pixels=None if self.pixels is None else self.pixels.expand(n, -1, -1, -1),
            latents=torch.zeros(n, 4, 4, 4) if self.pixels is None else None,
            prompts=("a cat",) * n,
            time_ids=torch.tensor([[PICTURE, PICTURE, 0, 0, PICTURE, PICTURE]]).float().expand(n, -1),
            seeds=torch.tensor([7 + position % 4 for position in positions]),
        )
