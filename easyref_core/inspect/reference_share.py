"""How large the reference term is beside the attention it is added to, measured where and when it is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..unet.layout import Site

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]  # rows and columns of the query tokens


class ShareKey(NamedTuple):
    """What one share is of: one side of the guidance, at one site, in one step."""

    sigma: float
    site: Site
    is_unconditional: bool


class Share(NamedTuple):
    """share: norm(reference term) / norm(attention), over all tokens; grid (rows, columns): the same of each token."""

    share: float
    grid: Tensor


def squares(tensor: Tensor) -> Tensor:
    """tensor (rows, tokens, inner) -> squared norm of each token, over all rows and channels (tokens,), float32."""
    return tensor.float().square().sum(dim=(0, 2))


def term_share(term: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms (tokens,) -> share (), and share of each token (tokens,). 0 where both are 0."""

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(part > 0, part / whole, 0.0).sqrt()

    return ratio(term.sum(), attention.sum()), ratio(term, attention)


def sides_of(unconditional: Sequence[bool]) -> list[tuple[bool, slice]]:
    """The sides of a batch and their rows, one entry for each run of rows of one side."""
    starts = [i for i, side in enumerate(unconditional) if i == 0 or side != unconditional[i - 1]]
    ends = [*starts[1:], len(unconditional)]
    return [(unconditional[start], slice(start, end)) for start, end in zip(starts, ends, strict=True)]


class Recorder:
    """Collects shares of the reference term while a model samples; `shares` gives them.

    What is recorded is the term as it is added (weight, layer, schedule and mask included), relative to what the
    attention gives without it: the text's attention and, in a chain, the terms of the nodes before. All rows of one
    side are taken together. Nothing is read back from the device until `shares`.

    Calls at the same sigma add up (split batches, a second evaluation by a guidance node, a second sampling): call
    `clear` before a sampling that is to be measured alone.
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
        """term, attention: (rows, tokens, inner); unconditional: of each row.

        grid: (rows, columns) of the tokens; where another pack changed their number, they are kept as one row.
        """
        tokens = term.shape[1]
        grid = grid if grid[0] * grid[1] == tokens else (1, tokens)
        for is_unconditional, rows in sides_of(unconditional):
            key = ShareKey(sigma, site, is_unconditional), grid
            found = tuple(squares(tensor[rows]) for tensor in (term, attention))
            before = self._squares.get(key)
            self._squares[key] = found if before is None else (before[0] + found[0], before[1] + found[1])

    def shares(self) -> dict[ShareKey, Share]:
        """{(sigma, site, is_unconditional): (share, grid (rows, columns) of each token's share)}, on the CPU, by
        falling sigma. Of calls on latents of several sizes (areas) the largest is given."""
        largest: dict[ShareKey, Grid] = {}
        for moment, grid in sorted(self._squares, key=lambda key: key[1][0] * key[1][1]):
            largest[moment] = grid
        shares = {}
        for moment in sorted(largest, key=lambda moment: -moment.sigma):
            share, tokens = term_share(*self._squares[moment, largest[moment]])
            shares[moment] = Share(share.item(), tokens.reshape(largest[moment]).cpu())
        return shares

    def clear(self) -> None:
        self._squares.clear()

    def __deepcopy__(self, memo: dict) -> Recorder:
        return self
