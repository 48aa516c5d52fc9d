"""Sample, Batch, collate, and the deterministic sample order, resumable by step."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .signals import ignore_stop

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from torch import Tensor
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    from ..mllm.config import EasyRefConfig
    from .base_model import BaseModel

Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One training example with cropped and resized images, after all random choices."""

    target: Tensor | None  # (3, H, W) in -1..1; None if moments are precomputed
    prompt: str  # input of SDXL's text encoders ("" when dropped)
    patches: Tensor  # (patches of all references, 1176): input of the vision tower, see preprocess.py
    grid: Tensor  # (K, 3): frames, rows, columns in patches
    input_ids: Tensor  # (S,)
    original_size: Size  # height, width
    crop: Size  # top, left
    target_size: Size  # height, width
    moments: Tensor | None = None  # (2, 4, h, w): mean and standard deviation of the latents, precomputed
    text: tuple[Tensor, Tensor] | None = None  # states (N, C) and pooled (P,) of the prompt, precomputed
    context: Tensor | None = None  # (S, D): context states, precomputed; the patches are then empty


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B collated samples. Exactly one of pixels, latents and moments is set."""

    pixels: Tensor | None = None  # (B, 3, H, W) in -1..1
    latents: Tensor | None = None  # (B, 4, h, w), precomputed
    moments: Tensor | None = None  # (2, B, 4, h, w): mean and standard deviation of the latents, precomputed
    text_states: Tensor | None = None  # (B, N, C), precomputed, and with it:
    text_pooled: Tensor | None = None  # (B, P)
    context: Tensor | None = None  # (B, S, D): context states, precomputed, zero at padding
    prompts: tuple[str, ...]
    time_ids: Tensor  # (B, 6) float: original height and width, crop top and left, target height and width
    patches: Tensor  # (patches of the whole batch, 1176), group by group
    grid: Tensor  # (sum of K, 3)
    references: tuple[int, ...]  # K of each group
    input_ids: Tensor  # (B, S), padded on the left
    padding_mask: Tensor  # (B, S) bool: True at a token, False at padding
    seeds: Tensor  # (B,) int64: each sample's noise and timestep are drawn from its seed alone
    broken: tuple[str, ...] = ()  # reasons of the rows that were replaced by others

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)


class Examples(Protocol):
    """Data set of the training loop, indexed by position in the endless stream."""

    def __len__(self) -> int:
        """Rows of one epoch."""

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the samples at these positions; a position decides the row and all randomness.

        A row that cannot be used is replaced by another one, also decided by the position alone, and its
        reason is in Batch.broken.
        """


LoadExamples = Callable[["BaseModel", "EasyRefConfig"], Examples]


def stream(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Positions of one rank's micro-batch; a resumed run needs only the step, counted in micro-batches.

    W ranks of batch B together take the positions that one rank of batch W * B takes.
    """
    start = (step * world_size + rank) * batch_size
    return range(start, start + batch_size)


def row_at(position: int, length: int, seed: int) -> int:
    """Index of the row at a position; each epoch is a permutation of all `length` rows."""
    epoch, index = divmod(position, length)
    return int(_permutation(length, seed, epoch)[index])


def generator(position: int, seed: int) -> np.random.Generator:
    """Random generator of the sample at a position."""
    return np.random.default_rng([seed, position])


@lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    # the 1 distinguishes it from generator(epoch, seed)
    return np.random.default_rng([seed, epoch, 1]).permutation(length)


def new_seed(rng: np.random.Generator) -> int:
    """Draw a sample's seed; call it after all other draws of the sample."""
    return int(rng.integers(2**63))


def collate(samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
    """Collate samples into a batch. Raises ValueError if their target sizes differ."""
    input_ids, padding_mask = pad_left([sample.input_ids for sample in samples])
    sizes = [(*sample.original_size, *sample.crop, *sample.target_size) for sample in samples]
    first = samples[0]
    stored: dict[str, Tensor] = {}
    if first.text is not None:
        columns = zip(*(sample.text for sample in samples), strict=True)
        stored |= dict(zip(("text_states", "text_pooled"), map(torch.stack, columns), strict=True))
    if first.context is not None:
        contexts = [sample.context for sample in samples]
        stored["context"] = pad_sequence(contexts, batch_first=True, padding_side="left")
    if first.moments is not None:
        stored["moments"] = _stack([sample.moments for sample in samples]).transpose(0, 1)
    else:
        stored["pixels"] = _stack([sample.target for sample in samples])
    return Batch(
        **stored,
        prompts=tuple(sample.prompt for sample in samples),
        time_ids=torch.tensor(sizes, dtype=torch.float32),
        patches=torch.cat([sample.patches for sample in samples]),
        grid=torch.cat([sample.grid for sample in samples]),
        references=tuple(len(sample.grid) for sample in samples),
        input_ids=input_ids,
        padding_mask=padding_mask,
        seeds=torch.tensor(seeds, dtype=torch.int64),
    )


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad ids (S_i,) to (B, S), S the longest, and return them with their padding mask (B, S).

    The authors pad every row to 256 tokens. Padding is masked and RoPE depends only on differences of
    positions, so left padding to any length gives the same result. (Right padding would put a gap of
    positions before the reference tokens, which an unpadded group at inference does not have.)
    """
    longest = max(len(row) for row in rows)
    # padded with the row's own first id, <|im_start|>, because it is never an image token
    ids = torch.stack([torch.cat([row[:1].expand(longest - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) >= longest - lengths[:, None]


def _stack(targets: Sequence[Tensor]) -> Tensor:
    """Stack targets (3, H, W), or their moments (2, 4, h, w)."""
    sizes = sorted({(target.shape[-2], target.shape[-1]) for target in targets})
    if len(sizes) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(
            f"The targets of one batch have different sizes (height x width: {listed}), expected one size. "
            "With native: true set batch_size to 1 and raise accumulation, or set native: false."
        )
    return torch.stack(list(targets))


@dataclass(frozen=True)
class MicroBatches:
    """Map-style dataset of one rank's micro-batches, by step."""

    examples: Examples
    batch_size: int
    rank: int = 0
    world_size: int = 1
    first: int = 0  # position of the first sample of step 0

    def __getitem__(self, step: int) -> Batch:
        start = self.first + stream(step, self.batch_size, self.rank, self.world_size).start
        return self.examples.batch(range(start, start + self.batch_size))


def loader(micro_batches: MicroBatches, steps: range, workers: int = 0) -> Iterator[Batch]:
    """Iterate over the micro-batches of `steps`, always in order."""
    from torch.utils.data import DataLoader

    options = {"num_workers": workers, "worker_init_fn": ignore_stop}
    batches = iter(DataLoader(micro_batches, batch_size=None, sampler=steps, **options))
    if workers:
        # before the queues, by which the processes are told to end, are closed at exit with priority 10
        Finalize(None, _end, args=(weakref.ref(batches), batches._workers), exitpriority=20)
    return batches


def _end(batches: weakref.ref[_BaseDataLoaderIter], workers: Sequence[BaseProcess]) -> None:
    """End the data loading processes of an iterator that is left at exit, and those that one has left behind.

    One that is collected in a cycle, with its queues, cannot tell them to end. multiprocessing terminates and
    joins them after this, and those ignore SIGTERM, so it would wait for ever.
    """
    if (iterator := batches()) is not None:
        iterator._shutdown_workers()
    for worker in workers:
        worker.kill()
