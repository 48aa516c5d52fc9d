"""Size of the reference term relative to the attention output, recorded while a model samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import interpolate

from ..unet.layout import Site

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]  # rows and columns of the query tokens
Block = tuple[str, int]  # "input", "middle" or "output", and its number
BLOCK_LABELS = {"input": "in", "middle": "mid", "output": "out"}  # in the order of the UNet


class ShareKey(NamedTuple):
    """Key of one share: a step, a cross-attention site, and a branch of the guidance."""

    sigma: float
    site: Site
    is_unconditional: bool


class Share(NamedTuple):
    """norm(reference term) / norm(attention output): over all tokens, and per token as (rows, columns)."""

    share: float
    grid: Tensor


def squared_norms(tensor: Tensor) -> Tensor:
    """Return the squared norm of each token (tokens,), float32, over (rows, tokens, inner)."""
    return tensor.float().square().sum(dim=(0, 2))


def term_share(term: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share () and the share per token (tokens,) from squared norms; 0 where both are 0."""

    def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.where(numerator > 0, numerator / denominator, 0.0).sqrt()

    return ratio(term.sum(), attention.sum()), ratio(term, attention)


def branch_runs(unconditional: Sequence[bool]) -> list[tuple[bool, slice]]:
    """Return the runs of equal rows of a batch: (is_unconditional, rows) for each."""
    starts = [i for i, branch in enumerate(unconditional) if i == 0 or branch != unconditional[i - 1]]
    ends = [*starts[1:], len(unconditional)]
    return [(unconditional[start], slice(start, end)) for start, end in zip(starts, ends, strict=True)]


class Recorder:
    """Recorder of reference shares; `shares` returns them.

    It records the term as it is added (weight, layer, schedule and mask included), relative to the attention
    output without it: the text's attention and, in a chain, the terms of the earlier nodes. The rows of one
    branch are pooled. Nothing is copied from the device before `shares`, because a copy would stall the
    sampling.

    Calls at the same sigma add up (split batches, a second evaluation by a guidance node, a second sampling):
    call `clear` before a sampling that is to be measured alone.
    """

    def __init__(self) -> None:
        self._squares: dict[tuple[ShareKey, Grid], tuple[Tensor, Tensor]] = {}

    def record(
        self,
        sigma: float,
        site: Site,
        unconditional: Sequence[bool],
        term: Tensor,
        attention: Tensor,
        grid: Grid,
    ) -> None:
        """Add one call. term, attention: (rows, tokens, inner). unconditional: the branch of each row.

        grid: (rows, columns) of the tokens. If another pack changed the number of tokens, they are one row.
        """
        tokens = term.shape[1]
        grid = grid if grid[0] * grid[1] == tokens else (1, tokens)
        for is_unconditional, rows in branch_runs(unconditional):
            key = ShareKey(sigma, site, is_unconditional), grid
            squares = tuple(squared_norms(tensor[rows]) for tensor in (term, attention))
            before = self._squares.get(key)
            self._squares[key] = (
                squares if before is None else (before[0] + squares[0], before[1] + squares[1])
            )

    def shares(self) -> dict[ShareKey, Share]:
        """Return the recorded shares on the CPU, by falling sigma.

        If there were calls on latents of several sizes (areas), only the largest is returned.
        """
        largest: dict[ShareKey, Grid] = {}
        for key, grid in sorted(self._squares, key=lambda recorded: recorded[1][0] * recorded[1][1]):
            largest[key] = grid
        shares = {}
        for key in sorted(largest, key=lambda key: -key.sigma):
            share, tokens = term_share(*self._squares[key, largest[key]])
            shares[key] = Share(share.item(), tokens.reshape(largest[key]).cpu())
        return shares

    def clear(self) -> None:
        """Drop everything recorded so far."""
        self._squares.clear()


def share_by_block_and_step(shares: Mapping[ShareKey, Share]) -> tuple[list[Block], list[float], Tensor]:
    """Return the blocks in UNet order, the sigmas in falling order, and the mean share (blocks, steps).

    NaN where nothing was added.
    """
    order = list(BLOCK_LABELS)
    blocks = sorted({(k.site.block, k.site.number) for k in shares}, key=lambda b: (order.index(b[0]), b[1]))
    sigmas = sorted({key.sigma for key in shares}, reverse=True)
    per_cell: dict[tuple[int, int], list[float]] = {}
    for key, share in shares.items():
        cell = blocks.index((key.site.block, key.site.number)), sigmas.index(key.sigma)
        per_cell.setdefault(cell, []).append(share.share)
    values = torch.full((len(blocks), len(sigmas)), torch.nan)
    for cell, of_sites in per_cell.items():
        values[cell] = sum(of_sites) / len(of_sites)
    return blocks, sigmas, values


def share_map(shares: Mapping[ShareKey, Share]) -> Tensor:
    """Return the mean share at each position of the image (rows, columns), at the finest recorded grid."""
    grids = [share.grid for share in shares.values()]
    # a single row means that another pack merged tokens, so their positions are unknown
    spatial = [grid for grid in grids if grid.shape[0] > 1] or grids
    finest = max((tuple(grid.shape) for grid in spatial), key=lambda shape: shape[0] * shape[1])
    resized = [interpolate(grid[None, None].float(), finest, mode="bilinear")[0, 0] for grid in spatial]
    return torch.stack(resized).mean(dim=0)


def share_masks(recordings: Sequence[Mapping[ShareKey, Share]]) -> Tensor:
    """Return the share_map of each recording as masks (N, rows, columns), each scaled to a maximum of 1."""
    maps = [share_map(shares) for shares in recordings]
    shape = max((tuple(m.shape) for m in maps), key=lambda shape: shape[0] * shape[1])
    resized = [interpolate(m[None, None], shape)[0, 0] for m in maps]
    return torch.stack([m / m.max().clamp_min(1e-12) for m in resized])


def block_label(block: Block) -> str:
    """Return a short label of a block, such as "in 4", "mid" or "out 0"."""
    name, number = block
    return BLOCK_LABELS[name] if name == "middle" else f"{BLOCK_LABELS[name]} {number}"
