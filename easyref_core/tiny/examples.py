"""The procedural pictures as training examples: groups drawn from a pool whose latents are made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..mllm.instructions import INSTRUCTION, load_tokenizer, tokenize
from ..mllm.preprocess import patchify, preprocess
from ..training.batches import Batch, generator, new_seed, pad_left
from ..training.config import build
from ..training.examples import Augmentation, check_rates, choose, drops
from ..utils.images import black_image
from .dataset import draw_pool
from .groups import plan_group
from .images import COUNTS, NAMES, PICTURE, caption, held_out
from .qwen2_vl import IMAGE_GRID, IMAGE_TOKENS, LARGEST_GROUP, SIZE, body_config, prepared
from .sdxl import pool_latents

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from ..training.base_model import BaseModel
    from ..training.config import Settings

SMALLEST_GROUP = 2


@dataclasses.dataclass(frozen=True)
class ProceduralSettings:
    """What a YAML says of the procedural data."""

    groups: bool  # groups with a held-out target (stage 3), or single pictures that are their own reference
    copies: int = 3  # pictures of each combination of attributes
    truncation: float = 0.0  # as of JSON rows
    drop_image: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        check_rates(self.truncation, self.drop_image, self.drop_text, self.drop_both)
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; wanted 1 or more.")


def load_procedural(settings: Settings, base: BaseModel, config: EasyRefConfig) -> ProceduralExamples:
    """The data set of `data.procedural`; training finds it by name (run.DATASETS)."""
    procedural = build(ProceduralSettings, settings.data.procedural, "data.procedural.")
    return ProceduralExamples(base, settings.mllm, procedural, settings.seed)


class ProceduralExamples:
    """An endless stream of pictures or groups; every position is a new draw, so an epoch has no end to speak of."""

    def __init__(self, base: BaseModel, mllm: Path, settings: ProceduralSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.tokenizer, self.config = load_tokenizer(mllm), body_config()
        self.pool = draw_pool(seed, settings.copies)
        self.latents = pool_latents(base, self.pool)
        self.seen = prepared(self.pool.pictures, self.config)
        self.black, self.black_grid = preprocess([black_image()], self.config, SIZE)
        self.rules = Augmentation(
            truncation=settings.truncation,
            drop_image=settings.drop_image,
            drop_text=settings.drop_text,
            drop_both=settings.drop_both,
        )

    def __len__(self) -> int:
        return len(self.pool.pictures)

    def batch(self, positions: Sequence[int]) -> Batch:
        targets, prompts, references, ids, seeds = [], [], [], [], []
        for position in positions:
            rng = generator(position, self.seed)
            target, shown, prompt = self._group(rng) if self.settings.groups else self._single(rng)
            without_image, without_text = drops(self.rules, rng)
            prompt = "" if without_text else prompt
            counts = [IMAGE_TOKENS] * (1 if without_image else len(shown))
            targets.append(target)
            prompts.append(prompt)
            references.append([] if without_image else shown)
            ids.append(tokenize(self.tokenizer, INSTRUCTION + prompt, counts)[0])
            seeds.append(new_seed(rng))
        input_ids, padding_mask = pad_left(ids)
        patches, grid = self.read(references)
        return Batch(
            pixels=None,
            latents=self.latents[targets],
            prompts=tuple(prompts),
            time_ids=torch.tensor(
                [[PICTURE, PICTURE, 0, 0, PICTURE, PICTURE]] * len(ids), dtype=torch.float32
            ),
            patches=patches,
            grid=grid,
            references=tuple(max(1, len(group)) for group in references),
            input_ids=input_ids,
            padding_mask=padding_mask,
            seeds=torch.tensor(seeds),
        )

    def read(self, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Patches and grid of groups of pictures; an empty group is the one black image."""
        shown = [picture for group in groups for picture in group]
        count = IMAGE_GRID.prod().item()
        patches = patchify(self.seen[shown], self.config).split([count * len(group) for group in groups])
        parts = [
            (part, IMAGE_GRID.expand(len(group), -1)) if group else (self.black, self.black_grid)
            for group, part in zip(groups, patches, strict=True)
        ]
        patches, grids = zip(*parts, strict=True)
        return torch.cat(patches), torch.cat(grids)

    def _single(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        """A picture that is its own reference, and a caption that names none to all of its attributes."""
        while True:
            attributes = rng.integers(COUNTS)
            if not held_out(attributes):
                break
        named = rng.permutation(NAMES)[: rng.integers(len(NAMES) + 1)]
        (picture,) = self.pool.find(attributes[None], rng).tolist()
        return picture, [picture], caption(attributes, named)

    def _group(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        plan = plan_group(rng, int(rng.integers(SMALLEST_GROUP, LARGEST_GROUP + 1)))
        (target,) = self.pool.find(plan.target[None], rng).tolist()
        references = self.pool.find(plan.references, rng).tolist()
        return target, choose(references, LARGEST_GROUP, self.settings.truncation, rng), plan.prompt
