"""Operations of one step of SDXL's UNet and of the reference term, counted at full size without weights.

A step is one call on the two rows of classifier-free guidance. An operation is an addition or a
multiplication of a matrix product, a convolution or an attention, as torch.utils.flop_counter counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from easyref_core.checkpoint.checkpoint import lora_shapes
from easyref_core.training.counting import Cost, count
from easyref_core.training.full_size import DTYPE, EASYREF, FULL_SIZE, PROMPT_TOKENS, sites
from easyref_core.unet.diffusers_unet import attach
from easyref_core.unet.layout import parse_diffusers
from easyref_core.unet.reference_attention import KVProjections

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

ROWS = 2  # of the batch: classifier-free guidance
PIXELS_PER_LATENT = 8

Inputs = tuple[tuple["Tensor", ...], Mapping[str, "Tensor"]]


class Added(NamedTuple):
    """Operations of a step without references, and those that each way adds to them."""

    bare: Cost
    patched: Cost  # with this project's attachment
    projections: int  # K and V of all sites, once
    lora: int  # the attention LoRA, unmerged

    @property
    def term(self) -> int:
        return self.patched.flops - self.bare.flops

    @property
    def authors(self) -> int:
        """The authors' processors project K and V in each layer of each step, and run the LoRA beside it."""
        return self.term + self.projections + self.lora

    @property
    def ip_adapter_plus(self) -> int:
        """Cost in IPAdapter_plus, which projects K and V in every step; the host merges the LoRA."""
        return self.term + self.projections


def inputs(pixels: int, dtype: torch.dtype, device: str) -> Inputs:
    """Latents (2, 4, h, w), timesteps (2,), text (2, 77, 2048) and SDXL's other conditions; random values."""
    side = pixels // PIXELS_PER_LATENT

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    text = random(ROWS, PROMPT_TOKENS, EASYREF.token_width)
    tensors = random(ROWS, 4, side, side), torch.full((ROWS,), 500.0, device=device), text
    return tensors, {"text_embeds": random(ROWS, FULL_SIZE.pooled), "time_ids": random(ROWS, 6)}


def step(unet: UNet2DConditionModel, tensors: Inputs) -> Tensor:
    """One call of the UNet on what `inputs` returns."""
    (latents, timesteps, text), conditions = tensors
    return unet(latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=conditions).sample


def added(unet: UNet2DConditionModel, pixels: int) -> Added:
    """Count on a full-size UNet on the meta device; the LoRA's cost follows from its shapes."""
    projections = KVProjections(tuple(sites().values()), EASYREF.token_width, device="meta", dtype=DTYPE)
    tokens = empty(ROWS, EASYREF.num_tokens, EASYREF.token_width)
    bare, patched = counted(unet, pixels, None), counted(unet, pixels, 1.0)
    return Added(bare, patched, count(lambda: projections(tokens)).flops, lora_by_hand(pixels))


def counted(unet: UNet2DConditionModel, pixels: int, weight: float | None) -> Cost:
    """One step with references at this weight (0: outside their window); None attaches nothing."""
    tensors = inputs(pixels, DTYPE, "meta")
    if weight is None:
        return count(lambda: step(unet, tensors))
    attachment = attach(unet, weight=weight)
    attachment.condition([(empty(ROWS, EASYREF.num_tokens, width),) * 2 for width in sites().values()])
    try:
        return count(lambda: step(unet, tensors))
    finally:
        attachment.remove()


def term_by_hand(pixels: int) -> int:
    """Added.term from shapes: two products of queries with 64 keys and values at each site."""
    products = (queries(pixels, width) * EASYREF.num_tokens * width for width in sites().values())
    return 2 * 2 * ROWS * sum(products)


def lora_by_hand(pixels: int) -> int:
    """Two products at q, k, v and out of each attention, over its tokens (k and v of attn2: the text's)."""
    widths, operations = sites(), 0
    for name, shape in lora_shapes(EASYREF, widths).items():
        of_text = ".attn2." in name and ("to_k" in name or "to_v" in name)
        width = widths[parse_diffusers(name.removeprefix("unet."))]
        tokens = PROMPT_TOKENS if of_text else queries(pixels, width)
        operations += 2 * ROWS * tokens * shape[0] * shape[1]
    return operations


def queries(pixels: int, width: int) -> int:
    """Tokens of an image in an attention: latents are halved where it is 640 wide, quartered where 1280."""
    return (pixels // PIXELS_PER_LATENT // {640: 2, 1280: 4}[width]) ** 2


def copied_bytes(itemsize: int, images: int) -> int:
    """Bytes that IPAdapter_plus writes in a step by repeating K and V over a batch of `images`, with CFG."""
    return 2 * ROWS * images * EASYREF.num_tokens * sum(sites().values()) * itemsize


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=DTYPE, device="meta")
