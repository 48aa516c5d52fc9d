"""Order of a stream of shards: pure functions of a position, so a resumed run needs only its step.

The stream is a fixed number of partitions, each an endless sequence of batches. Batch b of the run is batch
b // P of partition b % P, so a data loading process whose number divides P reads its own partitions alone.
In every epoch of a source its row groups are shuffled and dealt to the partitions: each row is in one of them
once. A partition mixes the sources by their weights and is cut into blocks of rows, the shuffle buffer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class RowKey(NamedTuple):
    """A row in one epoch of its source; its sample is drawn from this alone."""

    source: int
    epoch: int
    row_group: int
    row: int  # in the row group


class Location(NamedTuple):
    """The batch of a position, and the sample in it."""

    partition: int
    block: int
    batch: int  # in the block
    item: int  # in the batch


class SourceOrder:
    """Endless sequence of one source's rows in one partition."""

    def __init__(self, row_group_sizes: np.ndarray, source: int, partition: int, partitions: int, seed: int):
        self.row_group_sizes, self.source = row_group_sizes, source
        self.partition, self.partitions, self.seed = partition, partitions, seed
        self.starts = [0]  # rows before each epoch

    def rows(self, start: int, stop: int) -> list[RowKey]:
        """The rows `start` to `stop` of the sequence."""
        keys: list[RowKey] = []
        while start < stop:
            epoch = self._epoch(start)
            groups = self.row_groups(epoch)
            ends = self.starts[epoch] + np.cumsum(self.row_group_sizes[groups])
            for i in range(int(np.searchsorted(ends, start, side="right")), len(groups)):
                end, first = int(ends[i]), int(ends[i] - self.row_group_sizes[groups[i]])
                taken = range(start - first, min(stop, end) - first)
                keys += [RowKey(self.source, epoch, int(groups[i]), row) for row in taken]
                start += len(taken)
                if start == stop:
                    break
        return keys

    def row_groups(self, epoch: int) -> np.ndarray:
        """The row groups of an epoch, in order. Dealing goes on where the epoch before it ended."""
        count = len(self.row_group_sizes)
        first = (self.partition - epoch * count) % self.partitions
        return _permutation(count, self.seed, self.source, epoch)[first :: self.partitions]

    def _epoch(self, start: int) -> int:
        while self.starts[-1] <= start:
            rows = self.row_group_sizes[self.row_groups(len(self.starts) - 1)].sum()
            self.starts.append(self.starts[-1] + int(rows))
        return bisect_right(self.starts, start) - 1


@lru_cache(maxsize=8)
def _permutation(length: int, seed: int, source: int, epoch: int) -> np.ndarray:
    # the last number distinguishes the uses of a seed
    return np.random.default_rng([seed, epoch, source, 2]).permutation(length)


class StreamOrder:
    """Order of the rows of several sources.

    Args:
        row_group_sizes: of each source, the number of rows of its row groups.
        weights: of each source; None: its number of rows, which gives every row equally often.
        partitions: number of them.
        buffer: rows of a block; rounded up to whole batches.
        batch_size: rows of a batch.
        seed: of all shuffling.
    """

    def __init__(
        self,
        row_group_sizes: Sequence[np.ndarray],
        weights: Sequence[float] | None = None,
        *,
        partitions: int,
        buffer: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.row_group_sizes = list(row_group_sizes)
        self.weights = list(weights or (int(rows.sum()) for rows in row_group_sizes))
        self.partitions, self.batch_size, self.seed = partitions, batch_size, seed
        self.batches = -(-buffer // batch_size)  # of a block
        self._orders: dict[int, list[SourceOrder]] = {}

    def locate(self, position: int) -> Location:
        """Location of a position."""
        number, item = divmod(position, self.batch_size)
        index, partition = divmod(number, self.partitions)
        return Location(partition, *divmod(index, self.batches), item)

    def block(self, partition: int, number: int) -> list[RowKey]:
        """The rows of a block, shuffled."""
        rows = self.batches * self.batch_size
        before, after = (apportion(rows * n, self.weights) for n in (number, number + 1))
        keys = [
            key
            for order, start, stop in zip(self._sources(partition), before, after, strict=True)
            for key in order.rows(start, stop)
        ]
        shuffled = self.generator(partition, number).permutation(len(keys))
        return [keys[i] for i in shuffled]

    def generator(self, partition: int, block: int) -> np.random.Generator:
        """Random generator of a block."""
        return np.random.default_rng([self.seed, partition, block, 3])

    def _sources(self, partition: int) -> list[SourceOrder]:
        if partition not in self._orders:
            self._orders[partition] = [
                SourceOrder(rows, source, partition, self.partitions, seed=self.seed)
                for source, rows in enumerate(self.row_group_sizes)
            ]
        return self._orders[partition]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` rows among sources by weight (Webster's method), so that no share falls as total grows.

    A share differs from its exact value by less than half the number of sources.
    """
    parts = [weight / sum(weights) for weight in weights]
    # the method gives at least this; the rest is assigned row by row
    shares = [max(0, int(part * (total - len(parts) / 2) - 0.5)) for part in parts]
    while sum(shares) < total:
        most = max(range(len(parts)), key=lambda i: parts[i] / (shares[i] + 0.5))
        shares[most] += 1
    return shares


def in_batches(
    sizes: Sequence[tuple[tuple[int, int], int] | None], batch_size: int, rng: np.random.Generator
) -> list[tuple[list[int], tuple[int, int] | None]]:
    """Group the rows of a block to batches of one target size and of similar numbers of image tokens.

    sizes: of each row its target's (height, width) and its image tokens; None: unknown. Returns the indices
    and the size of each batch, in random order. What is left of each size forms batches of similar aspect,
    whose size is that of most of their rows, so that every row is in a batch and all batches are full.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        if size is not None:
            by_size.setdefault(size[0], []).append(i)
    rest, batches = [], []
    for size, members in by_size.items():
        extra = len(members) % batch_size
        rest += members[:extra]
        ordered = sorted(members[extra:], key=lambda i: sizes[i][1])
        batches += [(chunk, size) for chunk in _chunks(ordered, batch_size)]
    rest.sort(key=lambda i: (sizes[i][0][0] / sizes[i][0][1], sizes[i][1]))
    rest += [i for i, size in enumerate(sizes) if size is None]
    most = max(by_size, key=lambda size: len(by_size[size]), default=None)
    for chunk in _chunks(rest, batch_size):
        counts: dict[tuple[int, int], int] = {}
        for i in chunk:
            if sizes[i] is not None:
                counts[sizes[i][0]] = counts.get(sizes[i][0], 0) + 1
        batches.append((chunk, max(counts, key=counts.get, default=most)))
    return [batches[i] for i in rng.permutation(len(batches))]


def _chunks(items: list[int], length: int) -> list[list[int]]:
    return [items[i : i + length] for i in range(0, len(items), length)]
