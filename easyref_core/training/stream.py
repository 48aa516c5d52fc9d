"""Data set of parquet shards, read while training: several sources by weight, shuffled, in buckets.

A process holds the row groups of one block for each partition that it reads, and those of the next one while
they are read ahead in a thread. The order is that of stream_order.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..mllm.preprocess import resized_sides
from ..mllm.tokenizer import load_tokenizer
from .batches import Sample, Size
from .crops import native_size
from .examples import RowSampler
from .parquet_shards import ParquetShards, StoredImage, StoredRow, open_shards
from .rows import InvalidRow, decode_image, image_size
from .stream_order import RowKey, StreamOrder, in_batches

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

    from ..mllm.config import EasyRefConfig
    from .base_model import BaseModel
    from .batches import LoadExamples
    from .config import Settings, Stream

log = logging.getLogger(__name__)

Tables = dict[tuple[int, int], "pyarrow.Table | InvalidRow"]  # by source and group


@dataclass(frozen=True)
class Block:
    """A block in memory. Each batch has the size of its targets; None: every image's own."""

    tables: Tables
    batches: list[tuple[list[RowKey], Size | None]]


class PartitionState:
    """Blocks of one partition: the current one, and the next while it is read ahead."""

    def __init__(self) -> None:
        self.number, self.block = -1, Block({}, [])
        self.ahead: Future[Block] | None = None


def open_stream(settings: Settings) -> LoadExamples:
    """Read the manifests of settings.data.stream; training finds it by name (run.DATASETS).

    Raises FileNotFoundError or ValueError for a source without shards.
    """
    data, sources = settings.data, open_sources(settings.data.stream)
    tokenizer = load_tokenizer(settings.mllm)

    def load(base: BaseModel, config: EasyRefConfig) -> StreamExamples:
        from accelerate import PartialState

        _warn_of_shared_partitions(data.stream, PartialState().num_processes * max(1, settings.workers))
        order = StreamOrder(
            [source.row_group_sizes for source in sources],
            data.stream.weights,
            partitions=data.stream.partitions,
            buffer=data.stream.buffer,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        options = {"apply_exif": data.apply_exif}
        return StreamExamples(sources, order, config, tokenizer, data.augmentation, **options)

    return load


def open_sources(stream: Stream) -> list[ParquetShards]:
    """The shards of each source, by their manifests."""
    return [open_shards(url) for url in stream.sources]


def describe_sources(stream: Stream) -> str:
    """The number of rows and shards of each source, from their manifests."""
    return "; ".join(
        f"{sum(source.rows)} rows in {len(source.rows)} shards of {source.url}, groups of at most "
        f"{source.max_references} references"
        for source in open_sources(stream)
    )


def _warn_of_shared_partitions(stream: Stream, readers: int) -> None:
    if stream.partitions % readers:
        log.warning(
            "data.stream.partitions is %d, not a multiple of the %d data loading processes, so several read "
            "the same row groups. The samples are right, but reading is slower. Set it to %d at the start of "
            "a run.",
            stream.partitions,
            readers,
            -(-stream.partitions // readers) * readers,
        )


class StreamExamples(RowSampler):
    """Examples (batches.py) of parquet shards. sampler: arguments of RowSampler but the seed, the order's."""

    def __init__(
        self, sources: Sequence[ParquetShards], order: StreamOrder, *sampler: Any, **options: Any
    ) -> None:
        super().__init__(*sampler, **options, seed=order.seed)
        self.sources, self.order = list(sources), order
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._partitions: dict[int, PartitionState] = {}
        self._executor: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None, "_partitions": {}, "_executor": None}

    def __len__(self) -> int:
        return sum(sum(source.rows) for source in self.sources)

    @property
    def max_references(self) -> int:
        """References of the largest group."""
        return min(max(source.max_references for source in self.sources), self.augmentation.max_references)

    def sample_at(self, position: int) -> tuple[Sample, int, list[str]]:
        location = self.order.locate(position)
        block = self.block(location.partition, location.block)
        if location.batch >= len(block.batches) // 2:
            self.read_ahead(location.partition)
        rows, size = block.batches[location.batch]
        following = block.batches[location.batch + 1 :], block.batches[: location.batch]
        others = (key for keys, _ in chain(*following) for key in keys)
        candidates = chain(rows[location.item :], rows[: location.item], others)
        remedy = "Check that this machine can read the sources of data.stream, or write their shards again."
        find_rows = (partial(self.row, block.tables, key) for key in candidates)
        return self.first_usable(find_rows, partial(self.generator, rows[location.item]), remedy, size)

    def block(self, partition: int, number: int) -> Block:
        """A block, read now unless it is the partition's current one or was read ahead."""
        if self._process != os.getpid():  # the threads of a parent do not run in a forked process
            self._reset()
        state = self._partitions.setdefault(partition, PartitionState())
        if state.number != number:
            ahead = state.ahead if state.number + 1 == number else None
            block = ahead.result() if ahead else self.read_block(partition, number, state.block.tables)
            state.number, state.block, state.ahead = number, block, None
        return state.block

    def read_ahead(self, partition: int) -> None:
        """Start to read the block after a partition's current one."""
        state = self._partitions[partition]
        if state.ahead is None:
            self._executor = self._executor or ThreadPoolExecutor(1)
            arguments = partition, state.number + 1, state.block.tables
            state.ahead = self._executor.submit(self.read_block, *arguments)

    def read_block(self, partition: int, number: int, previous: Tables) -> Block:
        """Read a block and group its rows to batches. previous: tables of the block before it."""
        keys = self.order.block(partition, number)
        tables: Tables = {}
        for key in dict.fromkeys((key.source, key.row_group) for key in keys):
            tables[key] = previous[key] if key in previous else self._read_row_group(*key)
        size = self.order.batch_size
        if size == 1:
            return Block(tables, [([key], None) for key in keys])
        rng = self.order.generator(partition, number)
        batches = in_batches([self.sizes(tables, key) for key in keys], size, rng)
        return Block(tables, [([keys[i] for i in batch], target) for batch, target in batches])

    def _read_row_group(self, source: int, group: int) -> pyarrow.Table | InvalidRow:
        try:
            return self.sources[source].read_row_group(group)
        except InvalidRow as reason:
            return reason

    def generator(self, key: RowKey) -> np.random.Generator:
        """Random generator of a row's sample in an epoch."""
        return np.random.default_rng([self.seed, *key, 4])

    def row(self, tables: Tables, key: RowKey) -> StoredRow:
        """A row of a block. Raises InvalidRow if its row group could not be read."""
        table = tables[key.source, key.row_group]
        if isinstance(table, InvalidRow):
            raise table
        return self.sources[key.source].row(table, key.row_group, key.row)

    def sizes(self, tables: Tables, key: RowKey) -> tuple[Size, int] | None:
        """(height, width) of a row's target and its image tokens, from the headers of its image files.

        None if they cannot be read. Dropped references are not considered.
        """
        try:
            row = self.row(tables, key)
            _, target, files = self.draw(row, self.generator(key))
            if row.face or (len(files) == 1 and not self.augmentation.native):
                files = [None]  # see `fit`
            return self.target_size(target), sum(map(self.tokens, files))
        except InvalidRow:
            return None

    def target_size(self, file: StoredImage) -> Size:
        """Height and width of a target after its resize or crop."""
        resolution = self.augmentation.resolution
        if not self.augmentation.native:
            return resolution, resolution
        return native_size(*self.file_size(file), resolution)[::-1]

    def tokens(self, file: StoredImage | None) -> int:
        """Image tokens of a reference; None: of a square crop."""
        size = self.augmentation.size
        width, height = (size, size) if file is None else self.file_size(file)
        height, width = resized_sides(height, width, self.config, size)[-1]
        return height * width // self.config.pixels_per_token**2

    def file_size(self, file: StoredImage) -> tuple[int, int]:
        """Width and height of an image file. Raises InvalidRow if its header cannot be read."""
        return image_size(file.buffer(), file.name, self.apply_exif)

    def load(self, file: StoredImage) -> Image.Image:
        """Decode an image file as RGB. Raises InvalidRow as `decode_image` does."""
        return decode_image(file.buffer(), file.name, self.apply_exif)
