"""Site: address of a cross-attention, and its conversion between diffusers and ComfyUI paths."""

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
            stage, attention = divmod(self.number - 1, RESNETS_PER_BLOCK + 1)  # input_blocks.0 is conv_in
            module = f"down_blocks.{stage}.attentions.{attention}"
        elif self.block == "output":
            stage, attention = divmod(self.number, RESNETS_PER_BLOCK + 1)
            module = f"up_blocks.{stage}.attentions.{attention}"
        else:
            module = "mid_block.attentions.0"
        return f"{module}.transformer_blocks.{self.index}"

    @property
    def comfy(self) -> str:
        """Path in ComfyUI's UNet, e.g. input_blocks.4.1.transformer_blocks.0."""
        module = "middle_block.1" if self.block == "middle" else f"{self.block}_blocks.{self.number}.1"
        return f"{module}.transformer_blocks.{self.index}"


def parse_diffusers(path: str) -> Site | None:
    """The site of a path such as down_blocks.1.attentions.0.transformer_blocks.3.attn2, or None."""
    match = re.match(
        r"(?:(down|up)_blocks\.(\d{1,3})|mid_block)"
        r"\.attentions\.(\d{1,3})\.transformer_blocks\.(\d{1,3})(?:\.|$)",
        path,
    )
    if match is None:
        return None
    half, stage, attention, index = match[1], int(match[2] or 0), int(match[3]), int(match[4])
    if half is None:
        return Site("middle", 0, index)
    number = stage * (RESNETS_PER_BLOCK + 1) + attention
    return Site("input", number + 1, index) if half == "down" else Site("output", number, index)


def parse_comfy(path: str) -> Site | None:
    """The site of a ComfyUI path such as input_blocks.4.1.transformer_blocks.0.attn2, or None."""
    match = re.match(
        r"(?:(input|output)_blocks\.(\d{1,3})|middle_block)\.1\.transformer_blocks\.(\d{1,3})(?:\.|$)", path
    )
    if match is None:
        return None
    return Site(match[1] or "middle", int(match[2] or 0), int(match[3]))


def in_processor_order(sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of diffusers' attn_processors (down, up, middle), as checkpoints number them."""
    return sorted(
        sites, key=lambda site: (("input", "output", "middle").index(site.block), site.number, site.index)
    )


def sdxl_sites(depths: tuple[Sequence[int], int, Sequence[int]] = SDXL_DEPTHS) -> list[Site]:
    """The 70 cross-attention sites of SDXL, or of such a UNet with other depths, in processor order."""
    down, middle, up = depths
    stride = RESNETS_PER_BLOCK + 1
    sites = [
        Site("input", 1 + stage * stride + attention, index)
        for stage, depth in enumerate(down)
        for attention in range(RESNETS_PER_BLOCK)
        for index in range(depth)
    ]
    sites += [
        Site("output", stage * stride + attention, index)
        for stage, depth in enumerate(up)
        for attention in range(stride)
        for index in range(depth)
    ]
    return sites + [Site("middle", 0, index) for index in range(middle)]


def require_fit(unet: str, widths: Mapping[Site, int], expected: Mapping[Site, int]) -> None:
    """Raises ValueError if the cross-attentions {site: width} of a UNet are not those of a checkpoint.

    unet: name of the UNet in the error.
    """
    if widths == expected:
        return
    found, wanted = _summary(widths), _summary(expected)
    if found == wanted:  # as many of each width, in other places
        found, wanted = f"{found}, {_only(widths, expected)}", f"{wanted}, {_only(expected, widths)}"
    raise ValueError(
        f"{unet} does not fit the EasyRef checkpoint: it has {found}, the checkpoint is made for {wanted}. "
        "Use the kind of model it was trained on; the released EasyRef needs an SDXL base model (not SD1.5, "
        "Flux or the SDXL refiner)."
    )


def _only(sites: Mapping[Site, int], others: Mapping[Site, int]) -> str:
    """The first site whose width others do not have."""
    site, width = min(item for item in sites.items() if item not in others.items())
    return f"among them {site.comfy}, {width} wide"


def _summary(sites: Mapping[Site, int]) -> str:
    if not sites:
        return "no cross-attentions of Stable Diffusion's kind"
    widths = ", ".join(f"{n} x {w} wide" for w, n in sorted(Counter(sites.values()).items()))
    return f"{len(sites)} cross-attentions ({widths})"
