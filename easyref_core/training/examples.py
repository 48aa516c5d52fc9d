"""JSON rows as training examples: a row and a random generator -> everything the loop reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..files.image_files import open_image
from ..mllm.instructions import INSTRUCTION, image_token_id, tokenize
from ..mllm.preprocess import SIZE, preprocess
from ..utils.images import black_image, to_rgb
from .batches import Batch, Sample, collate, generator, new_seed, row_at
from .crops import crop_frame, face_crop, native_frame, single_reference

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from .rows import Row


@dataclass(frozen=True)
class Augmentation:
    """How examples are made of rows. The values are the authors'; stage 3 sets native, truncation and max_length."""

    resolution: int = 1024  # pixels: the short side of a crop, the root of the area in native aspect
    native: bool = False  # the whole picture in its own aspect, instead of a square crop (stage 3: True)
    size: int = SIZE  # pixels at which the MLLM sees a reference
    max_references: int = 28
    truncation: float = 0.0  # chance to keep only some references of a group (stage 3: 0.4)
    drop_image: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    max_length: int | None = 256  # tokens the MLLM reads, cut on the right (stage 3: None)

    def __post_init__(self) -> None:
        check_rates(self.truncation, self.drop_image, self.drop_text, self.drop_both)
        for name in ("resolution", "size", "max_references"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted 1 or more.")


def check_rates(truncation: float, drop_image: float, drop_text: float, drop_both: float) -> None:
    """Raise ValueError for chances that are none, and for drops that cannot exclude one another."""
    drops = {"drop_image": drop_image, "drop_text": drop_text, "drop_both": drop_both}
    for name, rate in {"truncation": truncation, **drops}.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} is {rate}; wanted a chance, 0 to 1.")
    if sum(drops.values()) > 1:
        raise ValueError(
            f"drop_image, drop_text and drop_both add up to {sum(drops.values()):g}; wanted at most 1."
        )


class RowExamples:
    """The rows of a file as Examples (batches.py): a position of the shuffled stream decides row and all randomness."""

    def __init__(
        self,
        rows: Sequence[Row],
        root: Path | str,
        config: EasyRefConfig,
        tokenizer: Tokenizer,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.rows, self.root = rows, Path(root)
        self.config, self.tokenizer = config, tokenizer
        self.augmentation, self.seed = augmentation or Augmentation(), seed

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Sequence[int]) -> Batch:
        samples, seeds = [], []
        for position in positions:
            rng = generator(position, self.seed)
            samples.append(self.sample(self.rows[row_at(position, len(self.rows), self.seed)], rng))
            seeds.append(new_seed(rng))
        return collate(samples, seeds)

    def sample(self, row: Row, rng: np.random.Generator) -> Sample:
        """One example of a row."""
        rules = self.augmentation
        text = row.texts[rng.integers(len(row.texts))]
        target, references = self.pictures(row, rng)

        frame = native_frame if rules.native else crop_frame
        framed = frame(target, rules.resolution)
        if len(references) == 1 and not rules.native:
            references = [single_reference(references[0], rules.resolution)]

        without_image, without_text = drops(rules, rng)
        text = "" if without_text else text
        patches, grid, input_ids = self.read([black_image()] if without_image else references, text, row)
        sizes = framed.original_size, framed.crop, framed.target_size
        return Sample(to_tensor(framed.image), text, patches, grid, input_ids, *sizes)

    def pictures(self, row: Row, rng: np.random.Generator) -> tuple[Image.Image, list[Image.Image]]:
        """The target and the chosen references, as they are on disk."""
        if row.face:
            target = self.open(row.target, row)
            return target, [face_crop(target, row.face, rng)]
        target, files = held_out(row, rng)
        files = choose(files, self.augmentation.max_references, self.augmentation.truncation, rng)
        return self.open(target, row), [self.open(file, row) for file in files]

    def open(self, file: str, row: Row) -> Image.Image:
        """A picture as RGB."""
        try:
            with open_image(self.root / file) as image:
                return to_rgb(image, file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{file} (row on line {row.line}) cannot be trained on: {error}. "
                "Set data.thorough to true, to find all such pictures before the run."
            ) from error

    def read(self, references: list[Image.Image], text: str, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """What the MLLM reads of references and text: patches, grid, input_ids (S,)."""
        patches, grid = preprocess(references, self.config, self.augmentation.size)
        counts = (grid.prod(dim=1) // self.config.merge_size**2).tolist()
        ids = tokenize(self.tokenizer, INSTRUCTION + text, counts)[0]
        limit, longest = self.augmentation.max_length, self.config.max_positions - self.config.num_tokens
        if limit and (ids[limit:] == image_token_id(self.tokenizer)).any():
            raise ValueError(
                f"The row on line {row.line} has {len(references)} references of {sum(counts)} image tokens in all; "
                f"max_length {limit} would cut them off. Groups are trained on in stage 3, with max_length null."
            )
        ids = ids[:limit]
        if len(ids) > longest:
            raise ValueError(
                f"The row on line {row.line} is {len(ids)} tokens long ({len(references)} references); the MLLM reads "
                f"{longest}. Lower max_references or size."
            )
        return patches, grid, ids


def held_out(row: Row, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The row's target and its references; of a group, one at random is the target and the rest are references."""
    if row.target is not None:
        return row.target, list(row.references)
    place = int(rng.integers(len(row.references)))
    return row.references[place], [*row.references[:place], *row.references[place + 1 :]]


def choose(files: Sequence[str], most: int, truncation: float, rng: np.random.Generator) -> list[str]:
    """The references in random order, at most `most`; with chance `truncation` only 2 to N - 1 of N > 2."""
    chosen = [files[i] for i in rng.permutation(len(files))][:most]
    if rng.random() < truncation and len(chosen) > 2:
        chosen = chosen[: rng.integers(2, len(chosen))]  # the bound is exclusive, as the authors' is
    return chosen


def drops(rules: Augmentation, rng: np.random.Generator) -> tuple[bool, bool]:
    """(drop the references?, drop the text?): one draw, so the three cases exclude each other."""
    image, text = rules.drop_image, rules.drop_text
    draw = rng.random()
    without_image = draw < image or image + text <= draw < image + text + rules.drop_both
    return without_image, image <= draw < image + text + rules.drop_both


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) in -1..1."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return pixels.permute(2, 0, 1).contiguous() * 2 - 1
