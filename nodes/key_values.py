"""Keys and values of reference tokens at every cross-attention: held, or projected again for the rows that
are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..easyref_core.attention import KeyValue

MAX_HELD_BYTES = 768 * 2**20  # of one TokenPair, in float32: 18 rows of SDXL's 70 attentions


class KeyValueRows(Protocol):
    """Rows of K and V: the unconditional ones, then the conditional ones.

    Of either side one row for all latents, or one for each latent; the last goes on where there are fewer
    rows than latents.
    """

    counts: tuple[int, int]  # unconditional rows, conditional rows
    row_numel: int  # elements of one row's K and V, of all sites together

    def take(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        """K and V per site of these rows, each (len(numbers), T, inner)."""
        ...


class HeldRows:
    """All rows, held on the CPU in float32."""

    def __init__(self, key_values: Sequence[KeyValue], unconditional_rows: int) -> None:
        """key_values: per site K and V (rows, T, inner)."""
        self._key_values = key_values
        self.counts = unconditional_rows, len(key_values[0][0]) - unconditional_rows
        self.row_numel = sum(k[0].numel() + v[0].numel() for k, v in key_values)

    def take(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        if list(numbers) == list(range(sum(self.counts))):
            return [(k.to(device, dtype), v.to(device, dtype)) for k, v in self._key_values]
        index = torch.tensor(numbers, device=self._key_values[0][0].device)
        return [
            (k.index_select(0, index).to(device, dtype), v.index_select(0, index).to(device, dtype))
            for k, v in self._key_values
        ]


class ProjectedRows:
    """Tokens whose K and V would not fit in `MAX_HELD_BYTES`: each row is projected when it is taken.

    Each row is projected by itself, as for HeldRows, so that its numbers do not depend on the rows taken with
    it.
    """

    def __init__(
        self,
        tokens: Tensor,
        unconditional_rows: int,
        row_numel: int,
        project: Callable[[Tensor], list[KeyValue]],
    ) -> None:
        """tokens: (rows, T, C). project: tokens (1, T, C) -> K and V per site, (1, T, inner)."""
        self._tokens, self._project = tokens, project
        self.counts = unconditional_rows, len(tokens) - unconditional_rows
        self.row_numel = row_numel

    def take(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        taken: list[KeyValue] = []
        for place, number in enumerate(numbers):
            row = self._project(self._tokens[number : number + 1])
            if not taken:
                taken = [
                    tuple(t.new_empty(len(numbers), *t.shape[1:], device=device, dtype=dtype) for t in kv)
                    for kv in row
                ]
            for (k, v), (row_k, row_v) in zip(taken, row, strict=True):
                k[place], v[place] = row_k[0], row_v[0]
        return taken


def project_rows(tokens: Tensor, project: Callable[[Tensor], list[KeyValue]]) -> list[KeyValue]:
    """Tokens (rows, T, C) -> K and V per site (rows, T, inner), each row projected by itself."""
    rows = [project(tokens[i : i + 1]) for i in range(len(tokens))]
    return [tuple(torch.cat(parts) for parts in zip(*site, strict=True)) for site in zip(*rows, strict=True)]
