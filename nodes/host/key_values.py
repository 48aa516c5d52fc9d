"""Keys and values of reference tokens at every cross-attention: a table, or a projection of the rows that are
sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ...easyref_core.unet.reference_attention import KeyValue

MAX_TABLE_BYTES = 768 * 2**20  # of one TokenPair, in float32: 18 rows of SDXL's 70 attentions

Project = Callable[["Tensor"], list["KeyValue"]]  # tokens (1, T, C) -> K and V per site, (1, T, inner)


class KeyValueRows(Protocol):
    """Rows of K and V: the unconditional ones, then the conditional ones.

    Of either side one row for all latents, or one for each latent; the last repeats where there are fewer
    rows than latents.
    """

    counts: tuple[int, int]  # unconditional rows, conditional rows
    row_numel: int  # elements of one row's K and V, of all sites together
    resident_rows: int  # rows that stay on the device beside those that are taken
    model: ModelPatcher | None  # that has to be loaded with the UNet

    def take(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        """K and V per site of these rows, each (len(numbers), T, inner)."""
        ...

    def release(self) -> None:
        """Give back copies on other devices."""
        ...


class KeyValueTable:
    """All rows, on the CPU in float32; a copy on each device that samples is kept until `release`."""

    model = None

    def __init__(self, key_values: Sequence[KeyValue], unconditional_rows: int) -> None:
        """key_values: per site K and V (rows, T, inner)."""
        self._key_values = key_values
        self._copies: dict[tuple[torch.device, torch.dtype], list[KeyValue]] = {}
        self.counts = unconditional_rows, len(key_values[0][0]) - unconditional_rows
        self.row_numel = sum(k[0].numel() + v[0].numel() for k, v in key_values)
        # of two rows the table itself is taken
        self.resident_rows = 0 if self.counts == (1, 1) else sum(self.counts)

    def take(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = [
                (k.to(device, dtype), v.to(device, dtype)) for k, v in self._key_values
            ]
        rows = self._copies[device, dtype]
        if list(numbers) == list(range(sum(self.counts))):
            return list(rows)
        index = torch.tensor(numbers, device=device)
        return [(k.index_select(0, index), v.index_select(0, index)) for k, v in rows]

    def release(self) -> None:
        self._copies.clear()


class KeyValueProjector:
    """Tokens whose K and V would not fit in MAX_TABLE_BYTES: each row is projected when it is taken.

    Each row is projected by itself, as for KeyValueTable, so that its numbers do not depend on the rows taken
    with it.
    """

    resident_rows = 0

    def __init__(
        self,
        tokens: Tensor,
        unconditional_rows: int,
        row_numel: int,
        project: Project,
        model: ModelPatcher | None = None,
    ) -> None:
        """tokens: (rows, T, C). model: of the projections, to be loaded with the UNet."""
        self._tokens, self._project = tokens, project
        self.counts = unconditional_rows, len(tokens) - unconditional_rows
        self.row_numel, self.model = row_numel, model

    def take(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        rows: list[KeyValue] = []
        for position, number in enumerate(numbers):
            row = self._project(self._tokens[number : number + 1])
            rows = rows or [_empty_like(key_value, len(numbers), device, dtype) for key_value in row]
            for (k, v), (row_k, row_v) in zip(rows, row, strict=True):
                k[position], v[position] = row_k[0], row_v[0]
        return rows

    def release(self) -> None:
        pass


def project_rows(tokens: Tensor, project: Project) -> list[KeyValue]:
    """Tokens (rows, T, C) -> K and V per site (rows, T, inner), each row projected by itself."""
    rows = [project(tokens[i : i + 1]) for i in range(len(tokens))]
    return [tuple(torch.cat(parts) for parts in zip(*site, strict=True)) for site in zip(*rows, strict=True)]


def _empty_like(key_value: KeyValue, rows: int, device: torch.device, dtype: torch.dtype) -> KeyValue:
    return tuple(
        tensor.new_empty(rows, *tensor.shape[1:], device=device, dtype=dtype) for tensor in key_value
    )
