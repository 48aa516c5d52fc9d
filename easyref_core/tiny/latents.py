"""Latents of a dataset: images are encoded when they are first drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..training.base_model import BaseModel

# Images that the VAE encodes together. Larger batches leave a CPU's cache and take twice as long.
ENCODED = 16


class DatasetLatents:
    """Scaled latents (M, C, 8, 8) of images (M, 64, 64, 3); an index is a list of image numbers.

    A short run draws few of the thousands of images. Images are encoded in blocks, which are the same in
    every run, so that their latents do not depend on the order of the draws.

    encode: pixels (N, 3, 64, 64) in -1..1 -> latents (N, C, 8, 8).
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], images: NDArray[np.uint8]) -> None:
        self.encode, self.images = encode, images
        self._blocks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, numbers: Iterable[int]) -> Tensor:
        places = [divmod(number, ENCODED) for number in numbers]
        return torch.stack([self._block(block)[i] for block, i in places])

    @torch.no_grad()
    def _block(self, block: int) -> Tensor:
        if block not in self._blocks:
            images = self.images[block * ENCODED :][:ENCODED]
            pixels = torch.from_numpy(images).movedim(-1, 1)
            self._blocks[block] = self.encode(pixels / 127.5 - 1)
        return self._blocks[block]


_latest: dict[str, DatasetLatents] = {}


def encode_dataset(base: BaseModel, images: NDArray[np.uint8]) -> DatasetLatents:
    """Latents of images (M, 64, 64, 3) by the base's VAE.

    Caches the last result, because every stage of a training needs the same.
    """
    digest = hashlib.sha256(images)
    for weight in base.vae.state_dict().values():
        digest.update(weight.cpu().contiguous().numpy())
    key = digest.hexdigest()
    if key not in _latest:
        _latest.clear()
        _latest[key] = DatasetLatents(base.encode_images, images)
    return _latest[key]
