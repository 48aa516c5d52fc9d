"""Single pictures and their captions as the IP-Adapter's training reads them: what stages 1 and 2 draw, with pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..training.batches import generator, new_seed
from .classifier import to_tensor
from .images import NAMES, PICTURE, caption
from .sdxl import pool_latents

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.base_model import BaseModel
    from .dataset import Pool


class Captioned(NamedTuple):
    """B pictures, each under a caption that names none to all of its attributes."""

    pixels: Tensor  # (B, 3, 64, 64) in -1..1
    latents: Tensor  # (B, 4, 8, 8)
    prompts: tuple[str, ...]
    time_ids: Tensor  # (B, 6)
    seeds: Tensor  # (B,)


class SinglePictures:
    """The pool's pictures in endless random order; a position decides everything."""

    def __init__(self, base: BaseModel, pool: Pool, seed: int) -> None:
        self.pool, self.seed = pool, seed
        self.latents = pool_latents(base, pool)

    def batch(self, positions: Sequence[int]) -> Captioned:
        rngs = [generator(position, self.seed) for position in positions]
        picked = [int(rng.integers(len(self.pool.pictures))) for rng in rngs]
        named = [rng.permutation(NAMES)[: rng.integers(len(NAMES) + 1)] for rng in rngs]
        prompts = [caption(self.pool.attributes[i], names) for i, names in zip(picked, named, strict=True)]
        sizes = torch.tensor([[PICTURE, PICTURE, 0, 0, PICTURE, PICTURE]], dtype=torch.float32)
        return Captioned(
            to_tensor(np.ascontiguousarray(self.pool.pictures[picked])),
            self.latents[picked],
            tuple(prompts),
            sizes.expand(len(picked), -1),
            torch.tensor([new_seed(rng) for rng in rngs]),
        )
