"""Selection of the rows of K and V that a batch attends to: pure functions of the batch's layout."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...easyref_core.unet.layer_weights import BranchTokens

if TYPE_CHECKING:
    from torch import Tensor

    from .batch_layout import BatchLayout


class RowBlock(NamedTuple):
    """A run of equal rows of a batch."""

    unconditional: bool
    frame: int  # index of the row of tokens


@functools.lru_cache(maxsize=256)
def equal_runs(rows: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """One entry for each run of equal entries; all runs have one length, the longest that is possible.

    (u, u, c, c) -> (u, c); (u, c, u, c) -> (u, c, u, c); (c, c, c) -> (c,).
    """
    for length in range(len(rows), 0, -1):
        if len(rows) % length:
            continue
        runs = [rows[first : first + length] for first in range(0, len(rows), length)]
        if all(len(set(run)) == 1 for run in runs):
            return tuple(run[0] for run in runs)
    return rows


def runs_of(layout: BatchLayout, frames: int) -> tuple[RowBlock, ...]:
    """The equal runs of a batch, where `frames` frames have tokens of their own; the last repeats."""
    return equal_runs(
        tuple(RowBlock(row.unconditional, min(max(row.frame, 0), frames - 1)) for row in layout)
    )


class RowSelection(NamedTuple):
    """Rows to take from KeyValueRows, and the position of each run's row among them."""

    rows: tuple[int, ...]
    # per run; None: it attends to nothing
    positions: dict[BranchTokens, tuple[int | None, ...]]


def select_rows(
    runs: Sequence[RowBlock], counts: tuple[int, int], branches: Iterable[BranchTokens]
) -> RowSelection:
    """The rows for these runs. counts: unconditional and conditional rows; branches: of all sites."""
    selected = {branch: [_row_of(branch, run, counts) for run in runs] for branch in dict.fromkeys(branches)}
    # at least one, because a batch that attends to nothing still needs the shape of K and V
    rows = tuple(dict.fromkeys(row for each in selected.values() for row in each if row is not None)) or (0,)
    positions = {
        branch: tuple(None if row is None else rows.index(row) for row in each)
        for branch, each in selected.items()
    }
    return RowSelection(rows, positions)


def _row_of(branch: BranchTokens, run: RowBlock, counts: tuple[int, int]) -> int | None:
    unconditional_tokens = branch.unconditional if run.unconditional else branch.conditional
    if unconditional_tokens is None:
        return None
    if unconditional_tokens:
        return min(run.frame, counts[0] - 1)
    return counts[0] + min(run.frame, counts[1] - 1)


class RowIndex(NamedTuple):
    """Index that gathers rows of a tensor."""

    index: Tensor | None  # on the tensor's device; None: all rows in their order
    zeros: tuple[int, ...]  # rows that attend to nothing: with K and V of zeros their reference term is 0

    @classmethod
    def of(cls, positions: Sequence[int | None], rows: int, device: torch.device) -> RowIndex:
        """positions: of the rows to gather, None for zeros. rows: that the tensor has."""
        if list(positions) == list(range(rows)):
            return cls(None, ())
        zeros = tuple(i for i, position in enumerate(positions) if position is None)
        return cls(torch.tensor([position or 0 for position in positions], device=device), zeros)

    def gather(self, tensor: Tensor) -> Tensor:
        if self.index is None:
            return tensor
        rows = tensor.index_select(0, self.index)
        for row in self.zeros:
            rows[row] = 0
        return rows
