"""A folder of tensors that were computed once, each under the hash of what it was computed from.

Two things of a training step do not change while a stage runs, and can be kept: the latents' distribution (the VAE is
frozen) and, in stage 1, the context states (the MLLM body is frozen). Because the key is the content, drawn texts and
dropped references are simply other entries, and changed pictures are never mistaken for the old ones.

What an entry of SDXL and Qwen2-VL-2B at 1024 pixels takes on disk:

    latents           mean and standard deviation, 2 x 4 x 128 x 128 float32: 0.52 MB a picture
    context states    206 x 1536 in bfloat16: 0.63 MB a reference and text

so ten million rows need 5.2 TB and 6.3 TB. Of an example of stage 1 they save 4.9 and 1.3 of 22.2 x 10^12 operations,
38 % and 5 % of its time (counted in docs/training_cost.md), from the second time on that it comes round. Pictures are
still read and framed, as the key is made of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from torch import Tensor

    from .batches import Batch

Tensors = dict[str, "Tensor"]


@dataclass
class Counts:
    """What a cache did since it was opened."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class Cache:
    """Tensors by key in a folder; any number of processes may share it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.counts = Counts()

    def get(self, key: str) -> Tensors | None:
        """The tensors of this key, memory-mapped; None where there are none, or the file is damaged."""
        path = self._path(key)
        try:
            tensors = load_file(path)
        except (FileNotFoundError, SafetensorError):
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        self.counts.bytes_read += path.stat().st_size
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under this key. The file appears whole or not at all, whoever else writes it."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{key}.{uuid4().hex}.part")
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
            self.counts.bytes_written += part.stat().st_size
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def through(
        self, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Mapping[str, Tensor]]]
    ) -> list[Tensors]:
        """The tensors of every key; those that are missing are computed together, by their indices, and kept."""
        found = [self.get(key) for key in keys]
        missing = [i for i, tensors in enumerate(found) if tensors is None]
        if missing:
            for i, tensors in zip(missing, compute(missing), strict=True):
                self.put(keys[i], tensors)
                found[i] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"  # 256 folders, so that none grows huge


def key_of(tag: str, *tensors: Tensor) -> str:
    """sha256 of a tag, which names the computation and the weights it uses, and of the tensors it starts from."""
    digest = hashlib.sha256(tag.encode())
    for tensor in tensors:
        digest.update(f"|{tensor.dtype}{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def moments(
    cache: Cache, tag: str, pixels: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pixels (B, 3, H, W), both (B, 4, h, w) on the CPU.

    The distribution is kept and not a draw from it, so that sampling stays as random as without a cache.
    encode: pixels -> (mean, standard deviation). tag: names the VAE's weights.
    """

    def compute(missing: list[int]) -> list[Tensors]:
        means, deviations = encode(pixels[missing])
        return [{"mean": m, "deviation": d} for m, d in zip(means, deviations, strict=True)]

    found = cache.through([key_of(tag, picture) for picture in pixels], compute)
    return torch.stack([t["mean"] for t in found]), torch.stack([t["deviation"] for t in found])


def contexts(
    cache: Cache, tag: str, batch: Batch, encode: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Context states (B, S, D) of a batch on the CPU, zero where it is padded; for stage 1, whose body is frozen.

    encode: patches, grid, input_ids (1, S) and real (1, S) of one group -> (1, S, D). tag: names the body's weights.
    """
    groups = mllm_inputs(batch)

    def compute(missing: list[int]) -> list[Tensors]:
        return [{"states": encode(*_alone(*groups[i]))[0]} for i in missing]

    found = cache.through([key_of(tag, *group) for group in groups], compute)
    longest = batch.input_ids.shape[1]
    states = [t["states"] for t in found]
    return torch.stack([torch.nn.functional.pad(s, (0, 0, longest - len(s), 0)) for s in states])


def mllm_inputs(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the MLLM reads of each group of a batch, without padding: patches, grid, input_ids (S,)."""
    grids = batch.grid.split(list(batch.references))
    patches = batch.patches.split([int(grid.prod(dim=1).sum()) for grid in grids])
    ids = [row[real] for row, real in zip(batch.input_ids, batch.real, strict=True)]
    return list(zip(patches, grids, ids, strict=True))


def _alone(patches: Tensor, grid: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return patches, grid, ids[None], torch.ones_like(ids, dtype=torch.bool)[None]
