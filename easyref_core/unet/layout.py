"""Where SDXL's cross-attentions are: diffusers path <-> ComfyUI address, generated from the shape of the UNet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

RESNETS_PER_BLOCK = 2  # SDXL's layers_per_block; a down block is 2 resnets and a downsampler
SDXL_DEPTHS = ((0, 2, 10), 10, (10, 2, 0))  # transformer blocks per attention: down blocks, middle, up blocks


class Site(NamedTuple):
    """One transformer block of the UNet, in the address form ComfyUI's attention patches use."""

    block: str  # "input", "middle" or "output"
    number: int  # index in ComfyUI's input_blocks / output_blocks; 0 for the middle
    index: int  # transformer block inside that attention module

    @property
    def diffusers(self) -> str:
        """Path in diffusers, e.g. down_blocks.1.attentions.0.transformer_blocks.0."""
        if self.block == "input":
            stage, place = divmod(self.number - 1, RESNETS_PER_BLOCK + 1)  # input_blocks.0 is conv_in
            where = f"down_blocks.{stage}.attentions.{place}"
        elif self.block == "output":
            stage, place = divmod(self.number, RESNETS_PER_BLOCK + 1)
            where = f"up_blocks.{stage}.attentions.{place}"
        else:
            where = "mid_block.attentions.0"
        return f"{where}.transformer_blocks.{self.index}"

    @property
    def comfy(self) -> str:
        """Path in ComfyUI's UNet, e.g. input_blocks.4.1.transformer_blocks.0."""
        where = "middle_block.1" if self.block == "middle" else f"{self.block}_blocks.{self.number}.1"
        return f"{where}.transformer_blocks.{self.index}"


def parse_diffusers(path: str) -> Site | None:
    """The site a diffusers path lies in, or None: down_blocks.1.attentions.0.transformer_blocks.3.attn2.processor."""
    match = re.match(
        r"(?:(down|up)_blocks\.(\d{1,3})|mid_block)\.attentions\.(\d{1,3})\.transformer_blocks\.(\d{1,3})(?:\.|$)",
        path,
    )
    if match is None:
        return None
    side, stage, place, index = match[1], int(match[2] or 0), int(match[3]), int(match[4])
    if side is None:
        return Site("middle", 0, index)
    number = stage * (RESNETS_PER_BLOCK + 1) + place
    return Site("input", number + 1, index) if side == "down" else Site("output", number, index)


def parse_comfy(path: str) -> Site | None:
    """The site a ComfyUI path lies in, or None: input_blocks.4.1.transformer_blocks.0.attn2."""
    match = re.match(
        r"(?:(input|output)_blocks\.(\d{1,3})|middle_block)\.1\.transformer_blocks\.(\d{1,3})(?:\.|$)", path
    )
    if match is None:
        return None
    return Site(match[1] or "middle", int(match[2] or 0), int(match[3]))


def in_processor_order(sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of diffusers' attn_processors: down, up, middle. Checkpoints number adapters in this order."""
    return sorted(
        sites, key=lambda site: (("input", "output", "middle").index(site.block), site.number, site.index)
    )


def sdxl_sites(depths: tuple[Sequence[int], int, Sequence[int]] = SDXL_DEPTHS) -> list[Site]:
    """The 70 cross-attention sites of SDXL (or of a UNet of its shape with other depths), in processor order."""
    down, middle, up = depths
    stride = RESNETS_PER_BLOCK + 1
    sites = [
        Site("input", 1 + stage * stride + place, index)
        for stage, depth in enumerate(down)
        for place in range(RESNETS_PER_BLOCK)
        for index in range(depth)
    ]
    sites += [
        Site("output", stage * stride + place, index)
        for stage, depth in enumerate(up)
        for place in range(stride)
        for index in range(depth)
    ]
    return sites + [Site("middle", 0, index) for index in range(middle)]


def require_fit(unet: str, found: Mapping[Site, int], wanted: Mapping[Site, int]) -> None:
    """Compare the cross-attentions {site: width} of a UNet with those a checkpoint was made for.

    unet: what to call it in the error.
    """
    if found == wanted:
        return
    raise ValueError(
        f"{unet} does not fit the EasyRef checkpoint: it has {_summary(found)}, the checkpoint is made for "
        f"{_summary(wanted)}. Use the kind of model it was trained on; the released EasyRef needs an SDXL base model "
        "(not SD1.5, Flux or the SDXL refiner)."
    )


def _summary(sites: Mapping[Site, int]) -> str:
    if not sites:
        return "no cross-attentions of Stable Diffusion's kind"
    counts = Counter(sites.values())
    return (
        f"{len(sites)} cross-attentions ("
        + ", ".join(f"{n} x {w} wide" for w, n in sorted(counts.items()))
        + ")"
    )
