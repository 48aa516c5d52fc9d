"""Samples, batches of them, and the endless shuffled stream they are taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One training example: images chosen, framed and resized; everything that was random is decided."""

    target: Tensor  # (3, H, W) in -1..1
    prompt: str  # what SDXL's text encoders read ("" when dropped)
    patches: Tensor  # (patches of all references, 1176): what the MLLM reads, see preprocess.py
    grid: Tensor  # (K, 3): frames, rows, columns in patches
    input_ids: Tensor  # (S,)
    original_size: Size  # height, width
    crop: Size  # top, left
    target_size: Size  # height, width


@dataclass(frozen=True)
class Batch:
    """B samples as the loop reads them."""

    pixels: Tensor | None  # (B, 3, H, W) in -1..1
    latents: Tensor | None  # (B, 4, h, w) where they were made beforehand; pixels is None then
    prompts: tuple[str, ...]
    time_ids: Tensor  # (B, 6) float: original height and width, crop top and left, target height and width
    patches: Tensor  # (patches of the whole batch, 1176), group by group
    grid: Tensor  # (sum of K, 3)
    references: tuple[int, ...]  # K of each group
    input_ids: Tensor  # (B, S), padded on the left
    real: Tensor  # (B, S) bool, False where padded
    seeds: Tensor  # (B,) int64, one per sample: its noise and its timestep come from its seed alone

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)


class Examples(Protocol):
    """What the loop trains on: JSON rows, or the procedural pictures of the tiny model."""

    def __len__(self) -> int:
        """Rows of one epoch."""

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the endless stream; a position decides row and all randomness."""


def stream(update: int, micro: int, rank: int, world: int, batch: int, accumulation: int) -> range:
    """Positions of one rank's micro-batch: a resumed run needs only the update's number to continue.

    W ranks with batch B together take the positions that one rank with batch W * B takes.
    """
    start = ((update * accumulation + micro) * world + rank) * batch
    return range(start, start + batch)


def row_at(position: int, length: int, seed: int) -> int:
    """Which of `length` rows lies at this position: each epoch is its own permutation of all rows."""
    epoch, place = divmod(position, length)
    return int(_permutation(length, seed, epoch)[place])


def generator(position: int, seed: int) -> np.random.Generator:
    """All randomness of the sample at this position."""
    return np.random.default_rng([seed, position])


@lru_cache(maxsize=2)  # a batch may cross from one epoch to the next
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    # the 1 tells it from generator(epoch, seed)
    return np.random.default_rng([seed, epoch, 1]).permutation(length)


def new_seed(rng: np.random.Generator) -> int:
    """A sample's seed, drawn after everything else of the sample."""
    return int(rng.integers(2**63))


def collate(samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
    """Samples of one target size -> their batch."""
    input_ids, real = pad_left([sample.input_ids for sample in samples])
    sizes = [(*sample.original_size, *sample.crop, *sample.target_size) for sample in samples]
    return Batch(
        pixels=_stack([sample.target for sample in samples]),
        latents=None,
        prompts=tuple(sample.prompt for sample in samples),
        time_ids=torch.tensor(sizes, dtype=torch.float32),
        patches=torch.cat([sample.patches for sample in samples]),
        grid=torch.cat([sample.grid for sample in samples]),
        references=tuple(len(sample.grid) for sample in samples),
        input_ids=input_ids,
        real=real,
        seeds=torch.tensor(seeds, dtype=torch.int64),
    )


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids (S_i,) -> ids (B, S), S the longest, and which of them are real (B, S).

    The authors pad every row to 256 tokens. Padding is masked and RoPE counts only differences of positions, so padding
    on the left, where the reference tokens then follow the text at once, is the same computation at any length: the
    longest row's is enough. (Padded on the right, a gap of positions would lie before the reference tokens, which
    generation, where nothing is padded, never has.)
    """
    longest = max(len(row) for row in rows)
    # padded with the row's own first id, which is <|im_start|> and never an image token
    ids = torch.stack([torch.cat([row[:1].expand(longest - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) >= longest - lengths[:, None]


def _stack(targets: Sequence[Tensor]) -> Tensor:
    sizes = sorted({(target.shape[-2], target.shape[-1]) for target in targets})
    if len(sizes) > 1:
        found = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(
            f"The targets of one batch have different sizes (height x width: {found}); wanted one size. "
            "With native aspect set the batch to 1 and accumulate instead, or frame by cropping."
        )
    return torch.stack(list(targets))


def loader(
    examples: Examples,
    update: int,
    updates: int,
    batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """This rank's micro-batches from update number `update` up to, not including, `updates`, always in order."""
    from torch.utils.data import DataLoader

    dataset = _MicroBatches(examples, batch, accumulation, rank, world)
    steps = range(update * accumulation, updates * accumulation)
    return iter(DataLoader(dataset, batch_size=None, sampler=steps, num_workers=workers))


@dataclass(frozen=True)
class _MicroBatches:
    """Step number, counted in micro-batches -> Batch, as DataLoader's workers ask for it."""

    examples: Examples
    batch: int
    accumulation: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch:
        update, micro = divmod(step, self.accumulation)
        return self.examples.batch(
            stream(update, micro, self.rank, self.world, self.batch, self.accumulation)
        )
