"""Training examples from the procedural dataset: groups for EasyRef, single images for the IP-Adapter."""

from __future__ import annotations

import abc
import dataclasses
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..mllm.config import EasyRefConfig
from ..mllm.instructions import INSTRUCTION, tokenize
from ..mllm.preprocess import patchify, preprocess
from ..mllm.tokenizer import load_tokenizer
from ..training.base_model import BaseModel
from ..training.batches import Batch, LoadExamples, generator, new_seed, pad_left
from ..training.config import Settings, build
from ..training.examples import Rates, choose, drops
from ..utils.images import black_image
from .classifier import to_tensor
from .dataset import Dataset, draw_dataset
from .groups import plan_group
from .images import COUNTS, IMAGE_SIZE, NAMES, caption, held_out
from .latents import DatasetLatents, encode_dataset
from .qwen2_vl import MAX_REFERENCES, body_config, resize_all
from .worlds import SHAPES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_REFERENCES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProceduralSettings(Rates):
    """Settings of the procedural data in a training's YAML."""

    groups: bool  # groups with a held-out target (stage 3), or single images that are their own reference
    copies: int = 3  # images of each combination of attributes, or views of each creature
    world: str = "shapes"  # of WORLDS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world not in WORLDS:
            raise ValueError(f"world is {self.world!r}; wanted one of {', '.join(WORLDS)}.")
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; wanted 1 or more.")


# Factories (base, mllm, settings, seed) -> ProceduralExamples of each world. They are named and not imported,
# because the creatures are built on this module.
WORLDS = {
    "shapes": "easyref_core.tiny.examples:ShapeExamples",
    "creatures": "easyref_core.tiny.creatures.examples:load_creatures",
}


def open_procedural(settings: Settings) -> LoadExamples:
    """Check the settings of `data.procedural`; training finds it by name (run.DATASETS)."""
    procedural = build(ProceduralSettings, settings.data.procedural, "data.procedural.")

    def load(base: BaseModel, config: EasyRefConfig) -> ProceduralExamples:
        factory = pkgutil.resolve_name(WORLDS[procedural.world])
        examples = factory(base, settings.mllm, procedural, settings.seed)
        if settings.workers:  # data loading processes have no VAE: one on a GPU cannot be used there
            examples.latents = examples.latents[range(len(examples))]
        return examples

    return load


class ProceduralExamples(abc.ABC):
    """An endless stream of images or groups; each position is a new draw.

    Args:
        tokenizer: of the MLLM.
        config: sizes of the MLLM.
        size: pixels of a reference for the MLLM; images of 64 pixels must not be resized by it.
        images: possible references (M, 64, 64, 3).
        latents: of the possible targets.
    """

    def __init__(
        self,
        settings: ProceduralSettings,
        seed: int,
        *,
        tokenizer: Tokenizer,
        config: EasyRefConfig,
        size: int,
        images: NDArray[np.uint8],
        latents: DatasetLatents,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.tokenizer, self.config, self.images = tokenizer, config, images
        self.latents: DatasetLatents | Tensor = latents
        side = IMAGE_SIZE // config.patch_size
        self.grid = torch.tensor([(1, side, side)])
        self.image_tokens = (side // config.merge_size) ** 2
        self.black, self.black_grid = preprocess([black_image()], config, size)

    @abc.abstractmethod
    def draw_single(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        """Draw an image that is its own reference: index of the target, of its references, and the prompt."""

    @abc.abstractmethod
    def draw_group(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        """Draw a group: index of the target, of its references, and the prompt."""

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, positions: Sequence[int]) -> Batch:
        targets, prompts, groups, ids, seeds = [], [], [], [], []
        for position in positions:
            rng = generator(position, self.seed)
            draw = self.draw_group if self.settings.groups else self.draw_single
            target, references, prompt = draw(rng)
            drop_image, drop_text = drops(self.settings, rng)
            prompt = "" if drop_text else prompt
            counts = [self.image_tokens] * (1 if drop_image else len(references))
            targets.append(target)
            prompts.append(prompt)
            groups.append([] if drop_image else references)
            ids.append(tokenize(self.tokenizer, INSTRUCTION + prompt, counts)[0])
            seeds.append(new_seed(rng))
        input_ids, padding_mask = pad_left(ids)
        patches, grid = self.patchify(groups)
        return Batch(
            latents=self.latents[targets],
            prompts=tuple(prompts),
            time_ids=time_ids(len(ids)),
            patches=patches,
            grid=grid,
            references=tuple(max(1, len(group)) for group in groups),
            input_ids=input_ids,
            padding_mask=padding_mask,
            seeds=torch.tensor(seeds),
        )

    def patchify(self, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Patches and grid of groups of images; an empty group becomes one black image."""
        images = [image for group in groups for image in group]
        count = self.grid.prod().item()
        patches = patchify(self.images[images], self.config).split([count * len(group) for group in groups])
        parts = [
            (part, self.grid.expand(len(group), -1)) if group else (self.black, self.black_grid)
            for group, part in zip(groups, patches, strict=True)
        ]
        patches, grids = zip(*parts, strict=True)
        return torch.cat(patches), torch.cat(grids)


class ShapeExamples(ProceduralExamples):
    """The examples of the shapes."""

    def __init__(self, base: BaseModel, mllm: Path, settings: ProceduralSettings, seed: int) -> None:
        self.dataset, config = draw_dataset(seed, settings.copies), body_config()
        super().__init__(
            settings,
            seed,
            tokenizer=load_tokenizer(mllm),
            config=config,
            size=SHAPES.size,
            images=resize_all(self.dataset.images, config),
            latents=encode_dataset(base, self.dataset.images),
        )

    def draw_single(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        while held_out(attributes := rng.integers(COUNTS)):
            pass
        named = _draw_names(rng)
        (image,) = self.dataset.sample(attributes[None], rng).tolist()
        return image, [image], caption(attributes, named)

    def draw_group(self, rng: np.random.Generator) -> tuple[int, list[int], str]:
        plan = plan_group(rng, int(rng.integers(MIN_REFERENCES, MAX_REFERENCES + 1)))
        (target,) = self.dataset.sample(plan.target[None], rng).tolist()
        references = self.dataset.sample(plan.references, rng).tolist()
        return target, choose(references, MAX_REFERENCES, self.settings.truncation, rng), plan.prompt


class SingleBatch(NamedTuple):
    """Images without references, each with a caption of some or all of its attributes."""

    pixels: Tensor  # (B, 3, 64, 64) in -1..1
    latents: Tensor  # (B, 8, 8, 8)
    prompts: tuple[str, ...]
    time_ids: Tensor  # (B, 6)
    seeds: Tensor  # (B,)


class SingleImages:
    """Training data of the IP-Adapter: the dataset in endless random order; each position is a new draw."""

    def __init__(self, base: BaseModel, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.latents = encode_dataset(base, dataset.images)

    def batch(self, positions: Sequence[int]) -> SingleBatch:
        rngs = [generator(position, self.seed) for position in positions]
        picked = [int(rng.integers(len(self.dataset.images))) for rng in rngs]
        named = [_draw_names(rng) for rng in rngs]
        attributes = self.dataset.attributes[picked]
        return SingleBatch(
            to_tensor(self.dataset.images[picked]),
            self.latents[picked],
            tuple(caption(row, names) for row, names in zip(attributes, named, strict=True)),
            time_ids(len(picked)),
            torch.tensor([new_seed(rng) for rng in rngs]),
        )


def time_ids(count: int) -> Tensor:
    """SDXL's size conditioning (count, 6): original size, no crop, target size."""
    return torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]] * count, dtype=torch.float32)


def _draw_names(rng: np.random.Generator) -> np.ndarray:
    """Draw none to all of the attributes' names."""
    return rng.permutation(NAMES)[: rng.integers(len(NAMES) + 1)]
