"""Weights for modules made on the meta device: random values of a plausible size, quickly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 2**20  # values drawn; they repeat from there on, which no matrix product notices


def materialised(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The module, moved from the meta device to `device`, with random weights, for inference."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.to(dtype).to_empty(device=device)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, parameter in module.named_parameters():
        fill(name, parameter, block)
    return module.eval()


def fill(name: str, tensor: Tensor, block: Tensor) -> None:
    """Random values with the scale that keeps activations near 1: 1 / sqrt(inputs). Norms are 1, biases 0."""
    if tensor.ndim < 2:
        tensor.fill_(name.endswith("weight"))
        return
    flat, scaled = tensor.view(-1), block / tensor[0].numel() ** 0.5
    for start in range(0, flat.numel(), BLOCK):
        part = flat[start : start + BLOCK]
        part.copy_(scaled[: part.numel()])
