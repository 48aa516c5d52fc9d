"""Recorded shares of the reference term (term_share.py), by block and step, and by place in the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from torch import Tensor

    from .reference_share import Share, ShareKey

Block = tuple[str, int]  # "input", "middle" or "output", and its number
SHORT = {"input": "in", "middle": "mid", "output": "out"}


def by_block_and_step(shares: Mapping[ShareKey, Share]) -> tuple[list[Block], list[float], Tensor]:
    """Blocks in the order of the UNet, sigmas falling, and the mean share of each block's sites (blocks, steps).

    NaN where nothing was added.
    """
    order = list(SHORT)
    blocks = sorted({(m.site.block, m.site.number) for m in shares}, key=lambda b: (order.index(b[0]), b[1]))
    sigmas = sorted({moment.sigma for moment in shares}, reverse=True)
    found: dict[tuple[int, int], list[float]] = {}
    for moment, share in shares.items():
        place = blocks.index((moment.site.block, moment.site.number)), sigmas.index(moment.sigma)
        found.setdefault(place, []).append(share.share)
    values = torch.full((len(blocks), len(sigmas)), torch.nan)
    for place, of_sites in found.items():
        values[place] = sum(of_sites) / len(of_sites)
    return blocks, sigmas, values


def by_place(shares: Mapping[ShareKey, Share]) -> Tensor:
    """The mean share at each place of the picture (rows, columns), at the finest grid of the UNet's attentions."""
    grids = [share.grid for share in shares.values()]
    # a site whose tokens another pack has made fewer has lost their places
    placed = [grid for grid in grids if grid.shape[0] > 1] or grids
    finest = max((tuple(grid.shape) for grid in placed), key=lambda shape: shape[0] * shape[1])
    spread = [interpolate(grid[None, None].float(), finest, mode="bilinear")[0, 0] for grid in placed]
    return torch.stack(spread).mean(dim=0)


def short_name(block: Block) -> str:
    """As in "in 4", "mid", "out 0"."""
    name, number = block
    return SHORT[name] if name == "middle" else f"{SHORT[name]} {number}"
