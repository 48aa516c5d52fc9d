"""Random weights for modules made on the meta device and for files, and the sizes of the models to make."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from devkit.golden import LAYOUT
from easyref_core.training.full_size import EASYREF
from easyref_core.unet.layout import Site, sdxl_sites

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 2**20  # values drawn; they repeat from there on, which no matrix product notices
QUICK = dataclasses.replace(
    EASYREF,
    vocab_size=4096,
    hidden_size=96,
    intermediate_size=160,
    body_layers=2,
    heads=6,
    kv_heads=2,
    vision_depth=2,
    vision_width=48,
    vision_mlp_width=192,
    vision_heads=3,
    projector_width=96,
    token_width=64,
    lora_rank=1,
)


SDXL_640_WIDE = {("input", 4), ("input", 5), ("output", 3), ("output", 4), ("output", 5)}  # latents halved


def sdxl_widths() -> dict[Site, int]:
    """The cross-attentions of SDXL's UNet and their widths."""
    return {site: 640 if (site.block, site.number) in SDXL_640_WIDE else 1280 for site in sdxl_sites()}


def materialize(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The module, moved from the meta device to `device`, with random weights, for inference."""
    module.requires_grad_(False).to(dtype).to_empty(device=device)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, parameter in module.named_parameters():
        fill(name, parameter, block)
    return module.eval()


def write_released(path: Path) -> int:
    """Write random bfloat16 tensors of every name and shape of the released file; -> their bytes."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes: dict[str, list[int]] = json.loads(LAYOUT.read_text(encoding="utf-8"))["keys"]
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        fill(name, tensor, block)
    save_file(tensors, path)
    return sum(tensor.nbytes for tensor in tensors.values())


def fill(name: str, tensor: Tensor, block: Tensor) -> None:
    """Fill with values at a scale that keeps activations near 1: 1 / sqrt(inputs). Norms are 1, biases 0."""
    if tensor.ndim < 2:
        tensor.fill_(name.endswith("weight"))
        return
    flat, block = tensor.view(-1), block / tensor[0].numel() ** 0.5
    for start in range(0, flat.numel(), BLOCK):
        piece = flat[start : start + BLOCK]
        piece.copy_(block[: piece.numel()])
