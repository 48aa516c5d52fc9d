"""FLOPs of one step of SDXL's UNet and of the reference term, counted at full size on the meta device.

A step is one call on the two rows of classifier-free guidance. Counted are matrix products, convolutions and
attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from easyref_core.checkpoint.checkpoint import lora_shapes
from easyref_core.training.counting import Cost, count
from easyref_core.training.full_size import DTYPE, EASYREF, POOLED, PROMPT_TOKENS, sites
from easyref_core.unet.diffusers_unet import attach
from easyref_core.unet.layout import parse_diffusers
from easyref_core.unet.reference_attention import KVProjections

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

ROWS = 2  # of the batch: classifier-free guidance
PIXELS_PER_LATENT = 8


class Added(NamedTuple):
    """Cost of a step without references, and the cost that each implementation adds."""

    bare: Cost
    patched: Cost  # with this project's attachment
    projections: int  # K and V of all sites, once
    lora: int  # the attention LoRA, unmerged

    @property
    def term(self) -> int:
        return self.patched.flops - self.bare.flops

    @property
    def authors(self) -> int:
        """Cost in the authors' code, which projects K and V in every step and runs the LoRA unmerged."""
        return self.term + self.projections + self.lora

    @property
    def ip_adapter_plus(self) -> int:
        """Cost in IPAdapter_plus, which projects K and V in every step; the host merges the LoRA."""
        return self.term + self.projections


def inputs(pixels: int, dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Random latents (2, 4, h, w), timesteps (2,), text (2, 77, 2048), and SDXL's added conditioning."""
    side = pixels // PIXELS_PER_LATENT

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    text = random(ROWS, PROMPT_TOKENS, EASYREF.token_width)
    arguments = random(ROWS, 4, side, side), torch.full((ROWS,), 500.0, device=device), text
    return arguments, {"text_embeds": random(ROWS, POOLED), "time_ids": random(ROWS, 6)}


def step(unet: UNet2DConditionModel, arguments: tuple[tuple[Tensor, ...], Mapping[str, Tensor]]) -> Tensor:
    """One call of the UNet on `inputs`."""
    (latents, timesteps, text), added = arguments
    return unet(latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample


def added(unet: UNet2DConditionModel, pixels: int) -> Added:
    """Count on a full-size UNet on the meta device; the LoRA's cost follows from its shapes."""
    projections = KVProjections(tuple(sites().values()), EASYREF.token_width, device="meta", dtype=DTYPE)
    tokens = empty(ROWS, EASYREF.num_tokens, EASYREF.token_width)
    bare, patched = counted(unet, pixels, None), counted(unet, pixels, 1.0)
    return Added(bare, patched, count(lambda: projections(tokens)).flops, lora_by_hand(pixels))


def counted(unet: UNet2DConditionModel, pixels: int, weight: float | None) -> Cost:
    """One step with references of this weight (0: outside their window); None attaches nothing."""
    arguments = inputs(pixels, DTYPE, "meta")
    if weight is None:
        return count(lambda: step(unet, arguments))
    attachment = attach(unet, weight=weight)
    attachment.condition([(empty(ROWS, EASYREF.num_tokens, width),) * 2 for width in sites().values()])
    try:
        return count(lambda: step(unet, arguments))
    finally:
        attachment.remove()


def term_by_hand(pixels: int) -> int:
    """Added.term from shapes: two products of queries with 64 keys and values at each site."""
    return sum(
        2 * 2 * ROWS * queries(pixels, width) * EASYREF.num_tokens * width for width in sites().values()
    )


def lora_by_hand(pixels: int) -> int:
    """Cost of the LoRA from shapes: two products at q, k, v and out of each attention."""
    widths = sites()
    shapes = lora_shapes(EASYREF, tuple(widths), tuple(widths.values()))
    operations = 0
    for name, shape in shapes.items():
        width = widths[parse_diffusers(name.removeprefix("unet."))]
        reads_text = ".attn2." in name and ("to_k" in name or "to_v" in name)
        tokens = PROMPT_TOKENS if reads_text else queries(pixels, width)
        operations += 2 * ROWS * tokens * shape[0] * shape[1]
    return operations


def queries(pixels: int, width: int) -> int:
    """Image tokens of an SDXL attention: the latents are halved at width 640, quartered at 1280."""
    return (pixels // PIXELS_PER_LATENT // {640: 2, 1280: 4}[width]) ** 2


def copied_bytes(itemsize: int, images: int) -> int:
    """Bytes that IPAdapter_plus writes per step by repeating K and V over `images` rows, with CFG."""
    return 2 * ROWS * images * EASYREF.num_tokens * sum(sites().values()) * itemsize


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=DTYPE, device="meta")
