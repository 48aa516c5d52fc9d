"""Samples per second and memory of a stream of shards, beside a plain loop over the same shards.

    python tools/bench/streaming.py [--rows 1000000] [--samples 20000] [--workers 0] [--folder FOLDER]

Rows are of tiny images, so what remains of a sample's time is mostly that of reading, decoding and
preprocessing in Python: 3 to 4 ms, whatever the number of rows. The plain loop reads every shard in order,
row group by row group, and makes samples of the same kind, one after another in one process. Processor
seconds are those of all processes and threads, so other work on the machine hardly changes them. Memory is
what a process does not share with others, at ten points of the stream.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2]))

from devkit.cpu_torch import complete_cpu_torch
from easyref_core.mllm.config import EasyRefConfig
from easyref_core.mllm.tokenizer import load_tokenizer
from easyref_core.training.batches import Batch, MicroBatches, collate, loader
from easyref_core.training.examples import Augmentation
from easyref_core.training.full_size import EASYREF
from easyref_core.training.parquet_shards import MANIFEST, ParquetShards, open_shards, write_shards
from easyref_core.training.rows import Row
from easyref_core.training.stream import StreamExamples
from easyref_core.training.stream_order import StreamOrder

TOKENIZER = Path(__file__).parents[2] / "easyref_core" / "tiny" / "weights" / "tiny-qwen2-vl"
FILES, SIDE, BATCH = 1000, 32, 8
POINTS = 10  # at which memory is measured
RULES = Augmentation(resolution=64, native=True, size=56, max_length=None)


def make_shards(folder: Path, count: int) -> ParquetShards:
    """Shards of `count` pairs of a target and a reference, of 1,000 files in three aspects."""
    if (folder / MANIFEST).is_file():
        return open_shards(str(folder))
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(FILES):
        sides = ((SIDE, SIDE), (SIDE, 2 * SIDE), (2 * SIDE, SIDE))[i % 3]
        pixels = rng.integers(0, 256, (*sides, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.jpg")
    rows = (Row(i, f"{i % FILES}.jpg", (f"{(i + 1) % FILES}.jpg",), (f"row {i}",)) for i in range(count))
    return write_shards(rows, images, folder)


def make_examples(shards: ParquetShards, config: EasyRefConfig, workers: int) -> StreamExamples:
    """A stream with a partition for each data loading process."""
    options = {"partitions": max(1, workers), "buffer": 512, "batch_size": BATCH, "seed": 0}
    order = StreamOrder([shards.row_group_sizes], **options)
    return StreamExamples([shards], order, config, load_tokenizer(TOKENIZER), RULES)


def plain_batches(shards: ParquetShards, examples: StreamExamples) -> Iterator[Batch]:
    """The rows in order, in batches of equal target sizes."""
    rng, buckets = np.random.default_rng(0), {}
    for group, size in enumerate(shards.row_group_sizes):
        table = shards.read_row_group(group)
        for index in range(size):
            sample = examples.sample(shards.row(table, group, index), rng)
            bucket = buckets.setdefault(sample.target_size, [])
            bucket.append(sample)
            if len(bucket) == BATCH:
                yield collate(bucket, [0] * BATCH)
                bucket.clear()


class Clock:
    """Elapsed seconds and processor seconds, of data loading processes once they have ended."""

    def __init__(self) -> None:
        self.start = self.now()

    def now(self) -> np.ndarray:
        return np.array([time.perf_counter(), sum(os.times()[:4])])

    def rates(self, samples: int) -> str:
        """Samples per second of both."""
        elapsed, processor = samples / (self.now() - self.start)
        return f"{elapsed:,.0f} samples per second, {processor:,.0f} per processor second"


def megabytes(others: set[psutil.Process]) -> list[int]:
    """Private memory of this process and of each of its children but `others`."""
    children = [child for child in psutil.Process().children() if child not in others]
    return [round(process.memory_full_info().uss / 1e6) for process in (psutil.Process(), *children)]


def measure(rows: int, samples: int, workers: int, folder: Path) -> Iterator[str]:
    """Lines of a report: samples per second of both ways, and megabytes along the stream."""
    start = time.perf_counter()
    shards = make_shards(folder, rows)
    yield f"{sum(shards.rows):,} rows, {time.perf_counter() - start:,.0f} s to make or open their shards"
    examples, steps = make_examples(shards, EASYREF, workers), samples // BATCH
    clock = Clock()
    count = sum(len(batch.prompts) for batch in islice(plain_batches(shards, examples), steps))
    yield f"plain loop: {clock.rates(count)}"
    memory, others, clock = [], set(psutil.Process().children()), Clock()
    for step, _ in enumerate(loader(MicroBatches(examples, BATCH), range(steps), workers), 1):
        if step % max(1, steps // POINTS) == 0:
            memory.append(megabytes(others))
    yield f"stream: {clock.rates(steps * BATCH)}"
    for number, column in enumerate(zip(*memory, strict=True)):
        yield f"megabytes of process {number} along the stream: {', '.join(map(str, column))}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=20_000, help="read by each way: %(default)s")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the shards there; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for line in measure(options.rows, options.samples, options.workers, folder):
            print(line, flush=True)


if __name__ == "__main__":
    complete_cpu_torch()
    main()
