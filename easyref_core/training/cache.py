"""Content-addressed disk cache of VAE moments and context states.

Two results of a training step do not change during a stage: the latents' distribution (the VAE is frozen)
and, in stage 1, the context states (the MLLM body is frozen). The key is a hash of the content, so drawn
texts and dropped references get entries of their own, and a changed image is never mistaken for the old one.

Size of an entry on disk for SDXL and Qwen2-VL-2B at 1024 pixels:

    latents           mean and standard deviation, 2 x 4 x 128 x 128 float32: 0.52 MB per image
    context states    206 x 1536 in bfloat16: 0.63 MB per reference and text

so ten million rows need 5.2 TB and 6.3 TB. They save 4.9 and 1.3 of the 20.9 TFLOP of a stage 1 example, 38 %
and 5 % of its time (docs/training_cost.md), from the second epoch on. Images are still read and cropped,
because the key is computed from them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from torch import Tensor

    from .batches import Batch

Tensors = dict[str, "Tensor"]


class TensorCache:
    """A folder of tensors by key, safe to share between processes."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> Tensors | None:
        """Return the tensors of a key, memory-mapped, or None if the file is missing or damaged."""
        try:
            return load_file(self._path(key))
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a key atomically.

        Unlike files.atomic_write the temporary name is unique, because several processes may write one key.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{key}.{uuid4().hex}.part")
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def get_or_compute(
        self, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Mapping[str, Tensor]]]
    ) -> list[Tensors]:
        """Return the tensors of every key. `compute` gets the indices of all misses in one call."""
        entries = [self.get(key) for key in keys]
        missing = [i for i, tensors in enumerate(entries) if tensors is None]
        if missing:
            for i, tensors in zip(missing, compute(missing), strict=True):
                self.put(keys[i], tensors)
                entries[i] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return entries

    def _path(self, key: str) -> Path:
        # two characters give 256 subfolders, because file systems slow down with millions of files in one
        return self.folder / key[:2] / f"{key}.safetensors"


def content_key(tag: str, *tensors: Tensor) -> str:
    """sha256 of a tag, which names the computation and its weights, and of the input tensors."""
    digest = hashlib.sha256(tag.encode())
    for tensor in tensors:
        digest.update(f"|{tensor.dtype}{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_moments(
    cache: TensorCache, tag: str, encode: Callable[[Tensor], tuple[Tensor, Tensor]], pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pixels (B, 3, H, W), both (B, 4, h, w) on the CPU.

    The distribution is cached instead of a draw, so sampling stays as random as without a cache.
    encode: pixels -> (mean, standard deviation). tag: names the VAE's weights.
    """

    def compute(missing: list[int]) -> list[Tensors]:
        means, deviations = encode(pixels[missing])
        return [{"mean": m, "deviation": d} for m, d in zip(means, deviations, strict=True)]

    entries = cache.get_or_compute([content_key(tag, image) for image in pixels], compute)
    return torch.stack([t["mean"] for t in entries]), torch.stack([t["deviation"] for t in entries])


def cached_contexts(
    cache: TensorCache, tag: str, encode: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], batch: Batch
) -> Tensor:
    """Context states (B, S, D) of a batch on the CPU, zero at padding; only valid for a frozen body.

    encode: patches, grid, input_ids (1, S) and padding mask (1, S) of one group -> (1, S, D). tag: names the
    body's weights.
    """
    grids = batch.grid.split(list(batch.references))
    patches = batch.patches.split([int(grid.prod(dim=1).sum()) for grid in grids])
    ids = [row[mask] for row, mask in zip(batch.input_ids, batch.padding_mask, strict=True)]
    groups = list(zip(patches, grids, ids, strict=True))

    def compute(missing: list[int]) -> list[Tensors]:
        return [
            {"states": encode(patches, grid, ids[None], torch.ones_like(ids[None], dtype=torch.bool))[0]}
            for patches, grid, ids in (groups[i] for i in missing)
        ]

    entries = cache.get_or_compute([content_key(tag, *group) for group in groups], compute)
    return pad_sequence([t["states"] for t in entries], batch_first=True, padding_side="left")
