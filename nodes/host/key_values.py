"""K and V of reference tokens: precomputed, or projected row by row above MAX_TABLE_BYTES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ...easyref_core.unet.reference_attention import KeyValue

MAX_TABLE_BYTES = 768 * 2**20  # of one TokenPair, in float32: 18 rows of SDXL's 70 attentions

Project = Callable[["Tensor"], list["KeyValue"]]  # tokens (1, T, C) -> K and V per site, (1, T, inner)


class KeyValueTable:
    """All rows, on the CPU in float32, with a copy on each device that samples until `release`.

    Rows: the unconditional ones, then the conditional ones. Each side has one row for all latents, or one for
    each latent; the last repeats where there are fewer rows than latents.

    counts: unconditional and conditional rows. row_numel: elements of one row's K and V, of all sites.
    resident_rows: rows that stay on the device beside copies of selected ones. model: to load with the UNet.
    """

    model = None

    def __init__(self, key_values: Sequence[KeyValue], unconditional_rows: int) -> None:
        """key_values: per site K and V (rows, T, inner)."""
        self._key_values = key_values
        self._copies: dict[tuple[torch.device, torch.dtype], list[KeyValue]] = {}
        self.counts = unconditional_rows, len(key_values[0][0]) - unconditional_rows
        self.row_numel = sum(k[0].numel() + v[0].numel() for k, v in key_values)
        # a table of two rows is used itself, without a copy of selected rows
        self.resident_rows = 0 if self.counts == (1, 1) else sum(self.counts)

    def select(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        """K and V per site of these rows, each (len(numbers), T, inner)."""
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
        """Release the copies on devices."""
        self._copies.clear()


class KeyValueProjector:
    """Tokens whose K and V exceed MAX_TABLE_BYTES; attributes and methods as of KeyValueTable.

    Each row is projected when it is selected, and separately, as for KeyValueTable, so that its numbers do
    not depend on the other rows.
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

    def select(self, numbers: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        rows: list[KeyValue] = []
        for position, number in enumerate(numbers):
            row = self._project(self._tokens[number : number + 1])
            rows = rows or [_empty_like(key_value, len(numbers), device, dtype) for key_value in row]
            for (k, v), (row_k, row_v) in zip(rows, row, strict=True):
                k[position], v[position] = row_k[0], row_v[0]
        return rows

    def release(self) -> None:
        pass


KeyValueRows = KeyValueTable | KeyValueProjector


def project_rows(tokens: Tensor, project: Project) -> list[KeyValue]:
    """Tokens (rows, T, C) -> K and V per site (rows, T, inner), each row projected separately."""
    rows = [project(tokens[i : i + 1]) for i in range(len(tokens))]
    return [tuple(torch.cat(parts) for parts in zip(*site, strict=True)) for site in zip(*rows, strict=True)]


def _empty_like(key_value: KeyValue, rows: int, device: torch.device, dtype: torch.dtype) -> KeyValue:
    return tuple(
        tensor.new_empty(rows, *tensor.shape[1:], device=device, dtype=dtype) for tensor in key_value
    )
