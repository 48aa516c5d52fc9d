"""Training examples of the creatures: groups for EasyRef, single images for the IP-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...mllm.tokenizer import load_tokenizer
from ...training.base_model import BaseModel
from ...training.batches import generator, new_seed
from ...training.examples import choose
from ..classifier import to_tensor
from ..examples import ProceduralExamples, ProceduralSettings, SingleBatch, time_ids
from ..latents import encode_dataset
from ..worlds import CREATURES
from .captions import caption
from .dataset import Dataset, draw_dataset
from .qwen2_vl import BODY, MAX_REFERENCES

MIN_REFERENCES = 2
COUNT = 6000  # identities
DATASET_SEED = 0
NAME_RATE = 0.85  # probability that a prompt names the ground; that it names the place


def load_creatures(base: BaseModel, mllm: Path, settings: ProceduralSettings, seed: int) -> CreatureExamples:
    """The examples of `world: creatures`; `copies` are the views of each creature."""
    return CreatureExamples(draw_dataset(DATASET_SEED, COUNT, settings.copies), base, mllm, settings, seed)


class CreatureExamples(ProceduralExamples):
    """Targets that are their own reference, or groups of views with one identity in common.

    The prompt names ground and place of the target, which differ in the references.
    """

    def __init__(
        self, dataset: Dataset, base: BaseModel, mllm: Path, settings: ProceduralSettings, seed: int
    ) -> None:
        self.dataset = dataset
        super().__init__(
            settings,
            seed,
            tokenizer=load_tokenizer(mllm),
            config=BODY,
            size=CREATURES.size,
            images=np.concatenate([dataset.targets, dataset.views.reshape(-1, *dataset.views.shape[2:])]),
            latents=encode_dataset(base, dataset.targets),
        )

    def draw_single(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        target = int(rng.integers(len(self.dataset)))
        return target, [target], draw_prompt(self.dataset, target, rng)

    def draw_group(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        target, count = int(rng.integers(len(self.dataset))), self.dataset.views.shape[1]
        drawn = rng.permutation(count)[: rng.integers(MIN_REFERENCES, MAX_REFERENCES + 1)]
        references = (len(self.dataset) + target * count + drawn).tolist()
        chosen = choose(references, MAX_REFERENCES, self.settings.truncation, rng)
        return target, chosen, draw_prompt(self.dataset, target, rng)


def draw_prompt(dataset: Dataset, target: int, rng: np.random.Generator) -> str:
    """Draw a caption of a target; each of ground and place is named at NAME_RATE."""
    ground, place = (
        int(value) if rng.random() < NAME_RATE else None
        for value in (dataset.grounds[target], dataset.places[target])
    )
    return caption(1, ground, place)


class SingleCreatures:
    """Training data of the IP-Adapter: targets in endless random order; each position is a new draw."""

    def __init__(self, base: BaseModel, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.latents = encode_dataset(base, dataset.targets)

    def batch(self, positions: Sequence[int]) -> SingleBatch:
        rngs = [generator(position, self.seed) for position in positions]
        picked = [int(rng.integers(len(self.dataset))) for rng in rngs]
        return SingleBatch(
            to_tensor(self.dataset.targets[picked]),
            self.latents[picked],
            tuple(draw_prompt(self.dataset, i, rng) for i, rng in zip(picked, rngs, strict=True)),
            time_ids(len(picked)),
            torch.tensor([new_seed(rng) for rng in rngs]),
        )
