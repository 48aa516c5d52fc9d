"""Data set of JSON rows: augments a row into a training sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..mllm.instructions import INSTRUCTION, image_token_id, tokenize
from ..mllm.preprocess import SIZE, preprocess
from ..mllm.tokenizer import load_tokenizer
from ..utils.images import black_image
from .batches import Batch, Sample, collate, generator, new_seed, row_at
from .crops import center_crop, crop_to, face_crop, native_resize, native_size
from .precomputed import Precomputed
from .rows import InvalidRow, load_image, read_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from .base_model import BaseModel
    from .batches import LoadExamples, Size
    from .config import Settings
    from .crops import Crop
    from .rows import Box, Row


MAX_TRIES = 100  # rows in place of one that cannot be used


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Probabilities of dropping references and texts. Raises ValueError for values that are not."""

    truncation: float = 0.0  # dropping some references of a group (stage 3: 0.4)
    drop_image: float = 0.05  # of the three drops, at most one is made
    drop_text: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        for name in ("truncation", "drop_image", "drop_text", "drop_both"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability, 0 to 1.")
        if (total := self.drop_image + self.drop_text + self.drop_both) > 1:
            raise ValueError(f"drop_image, drop_text and drop_both add up to {total:g}, expected at most 1.")


@dataclass(frozen=True, kw_only=True)
class Augmentation(Rates):
    """Augmentation of rows. The defaults are the authors'; stage 3 sets native, truncation and max_length."""

    resolution: int = 1024  # pixels: short side of a crop, or square root of the area in native aspect
    native: bool = False  # resize in native aspect instead of a square crop (stage 3: True)
    size: int = SIZE  # pixels of a reference for the MLLM
    max_references: int = 28
    max_length: int | None = 256  # MLLM tokens, truncated on the right (stage 3: None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("resolution", "size", "max_references", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")
        if self.resolution % 8 and not self.native:
            raise ValueError(
                f"resolution is {self.resolution}, expected a multiple of 8, the pixels of a latent."
            )


def open_rows(settings: Settings) -> LoadExamples:
    """Read and check the JSON rows of settings.data; training finds it by name (run.DATASETS).

    Raises FileNotFoundError or ValueError as `read_rows` does.
    """
    data = settings.data
    rows = read_rows(data.rows, data.root, data.skip_rows, data.thorough, data.apply_exif)
    stored = Precomputed(settings, rows) if settings.precomputed else None
    tokenizer = load_tokenizer(settings.mllm)
    options = {"seed": settings.seed, "apply_exif": data.apply_exif, "stored": stored}

    def load(base: BaseModel, config: EasyRefConfig) -> RowExamples:
        return RowExamples(rows, data.root, config, tokenizer, data.augmentation, **options)

    return load


class RowSampler:
    """Draws samples of rows; a subclass finds the rows of a position and loads their image files.

    apply_exif: see `decode_image`. stored: precomputed parts, in place of which no image is read, encoded or
    tokenized.
    """

    def __init__(
        self,
        config: EasyRefConfig,
        tokenizer: Tokenizer,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        *,
        apply_exif: bool = True,
        stored: Precomputed | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.augmentation, self.seed = augmentation or Augmentation(), seed
        self.apply_exif, self.stored = apply_exif, stored
        self.parts = stored.parts if stored else frozenset()

    def batch(self, positions: Sequence[int]) -> Batch:
        samples, seeds, reasons = zip(*map(self.sample_at, positions), strict=True)
        return dataclasses.replace(collate(samples, seeds), broken=tuple(chain.from_iterable(reasons)))

    def sample_at(self, position: int) -> tuple[Sample, int, list[str]]:
        """The sample at a position, its seed, and why rows before it are not usable: `first_usable`."""
        raise NotImplementedError

    def first_usable(
        self,
        find_rows: Iterable[Callable[[], Row]],
        make_generator: Callable[[], np.random.Generator],
        remedy: str,
        size: Size | None = None,
    ) -> tuple[Sample, int, list[str]]:
        """The sample and its seed of the first usable row, and why those before it are not usable.

        find_rows: functions that return a row or raise InvalidRow; the first MAX_TRIES are called.
        make_generator: all randomness is that of its generator, whichever row is used. size: see `sample`.
        Raises ValueError, with the remedy, if none of the rows can be used.
        """
        reasons: list[str] = []
        for find_row in islice(find_rows, MAX_TRIES):
            rng = make_generator()
            try:
                sample = self.sample(find_row(), rng, size)
            except InvalidRow as reason:
                reasons.append(str(reason))
            else:
                return sample, new_seed(rng), reasons
        raise ValueError(f"{len(reasons)} rows after another cannot be used, first {reasons[0]}. {remedy}")

    def sample(self, row: Row, rng: np.random.Generator, size: Size | None = None) -> Sample:
        """Draw a sample of a row. Raises InvalidRow for an unusable image and for too many tokens.

        size: height and width of the target in native aspect; None: the image's own.
        """
        text, file, files = self.draw(row, rng)
        try:
            image = None if "latents" in self.parts and not row.face else self.load(file)
            references = self.references(image, files, row.face, rng)
            drop_image, drop_text = drops(self.augmentation, rng)
            text = "" if drop_text else text
            target = self.target_inputs(file, image, size)
            group = self.group_inputs(files, references, text, drop_image)
        except InvalidRow as error:
            raise InvalidRow(f"{row.where}: {error}") from error
        states = self.stored.text(text) if "texts" in self.parts else None
        return Sample(**target, **group, prompt=text, text=states and (states["states"], states["pooled"]))

    def draw(self, row: Row, rng: np.random.Generator) -> tuple[str, Any, list[Any]]:
        """Text, target and references of a sample, the first draws of its generator."""
        text = row.texts[rng.integers(len(row.texts))]
        return text, *self.files(row, rng)

    def files(self, row: Row, rng: np.random.Generator) -> tuple[str, list[str]]:
        """A row's target and a random choice of its references; () if the target's face is the reference."""
        if row.face:
            return row.target, []
        target, files = held_out(row, rng)
        return target, choose(files, self.augmentation.max_references, self.augmentation.truncation, rng)

    def load(self, file: Any) -> Image.Image:
        """Load an image of a row as RGB. Raises InvalidRow as `decode_image` does."""
        raise NotImplementedError

    def references(
        self, target: Image.Image | None, files: Sequence[str], face: Box | None, rng: np.random.Generator
    ) -> list[Image.Image]:
        """The references as the MLLM is to see them, before its resize; none if contexts are precomputed."""
        if "contexts" in self.parts:
            return []
        return self.fit([face_crop(target, face, rng)] if face else [self.load(file) for file in files])

    def fit(self, references: list[Image.Image]) -> list[Image.Image]:
        """Crop a single reference as its target.

        The authors crop it at the target's corner, which adds black bars where the two differ in aspect (a
        face crop is square, its target seldom).
        """
        if len(references) > 1 or self.augmentation.native:
            return references
        return [center_crop(image, self.augmentation.resolution).image for image in references]

    def crop(self, target: Image.Image, size: Size | None = None) -> Crop:
        """Resize or crop a target; size: as of `sample`."""
        resolution = self.augmentation.resolution
        if not self.augmentation.native:
            return center_crop(target, resolution)
        if size is None or size[::-1] == native_size(target.width, target.height, resolution):
            return native_resize(target, resolution)
        return crop_to(target, size)

    def target_inputs(self, file: str, image: Image.Image | None, size: Size | None) -> dict[str, Any]:
        """The fields of a Sample that the target decides; an image that is not needed may be None."""
        if "latents" in self.parts:
            latents = self.stored.latents(file)
            pixels, moments, sizes = None, latents["moments"], map(tuple, latents["sizes"].tolist())
        else:
            crop = self.crop(image, size)
            pixels, moments, sizes = to_tensor(crop.image), None, crop[1:]
        sizes = dict(zip(("original_size", "crop", "target_size"), sizes, strict=True))
        return {"target": pixels, "moments": moments, **sizes}

    def group_inputs(
        self, files: Sequence[str], references: list[Image.Image], text: str, drop_image: bool
    ) -> dict[str, Any]:
        """The fields of a Sample that the references and the text decide."""
        if "contexts" in self.parts:
            [file] = files
            entry = self.stored.context(file, text, drop_image)
            patches = torch.empty(0, self.config.patch_values)
            return {"patches": patches, "context": entry.pop("states"), **entry}
        patches, grid, ids = self.mllm_inputs(None if drop_image else references, text)
        return {"patches": patches, "grid": grid, "input_ids": ids}

    @cached_property
    def black(self) -> tuple[Tensor, Tensor]:
        """Patches and grid of the black image, which costs more to resize than a small reference to load."""
        return preprocess([black_image()], self.config, self.augmentation.size)

    def mllm_inputs(self, references: list[Image.Image] | None, text: str) -> tuple[Tensor, Tensor, Tensor]:
        """Patches, grid (K, 3) and input_ids (S,) of references, or of the black image (None), and a text."""
        if references is None:
            patches, grid = self.black
        else:
            patches, grid = preprocess(references, self.config, self.augmentation.size)
        counts = (grid.prod(dim=1) // self.config.merge_size**2).tolist()
        ids = tokenize(self.tokenizer, INSTRUCTION + text, counts)[0]
        limit, longest = self.augmentation.max_length, self.config.max_positions - self.config.num_tokens
        if limit and (ids[limit:] == image_token_id(self.tokenizer)).any():
            raise InvalidRow(
                f"{len(grid)} references have {sum(counts)} image tokens, but max_length {limit} would "
                "truncate them. Train on groups in stage 3, with max_length null."
            )
        ids = ids[:limit]
        if len(ids) > longest:
            raise InvalidRow(
                f"the input is {len(ids)} tokens long ({len(grid)} references), but the MLLM accepts "
                f"at most {longest}. Lower max_references or size."
            )
        return patches, grid, ids


class RowExamples(RowSampler):
    """Examples (batches.py) of JSON rows. sampler: arguments of RowSampler."""

    def __init__(self, rows: Sequence[Row], root: Path | str, *sampler: Any, **options: Any) -> None:
        super().__init__(*sampler, **options)
        self.rows, self.root = rows, Path(root)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def max_references(self) -> int:
        """References of the largest group."""
        counts = (len(row.references) - (row.target is None) for row in self.rows)
        return min(max([1, *counts]), self.augmentation.max_references)

    def sample_at(self, position: int) -> tuple[Sample, int, list[str]]:
        find_rows = (partial(self.row, position + offset) for offset in range(len(self.rows)))
        remedy = (
            f"Check that the images in {self.root} can be read from this machine, and set data.thorough to "
            "true to list those that cannot."
        )
        return self.first_usable(find_rows, partial(generator, position, self.seed), remedy)

    def row(self, position: int) -> Row:
        """The row at a position."""
        return self.rows[row_at(position, len(self.rows), self.seed)]

    def load(self, file: str) -> Image.Image:
        """Load an image file as RGB. Raises InvalidRow as `load_image` does."""
        return load_image(self.root, file, self.apply_exif)


def held_out(row: Row, rng: np.random.Generator) -> tuple[str, list[str]]:
    """Return a row's target and references; of a group without a target, a random image is the target."""
    if row.target is not None:
        return row.target, list(row.references)
    index = int(rng.integers(len(row.references)))
    return row.references[index], [*row.references[:index], *row.references[index + 1 :]]


def choose(files: Sequence[str], most: int, truncation: float, rng: np.random.Generator) -> list[str]:
    """Shuffle references and take at most `most`; with probability `truncation` only 2 to N - 1 of N > 2."""
    chosen = [files[i] for i in rng.permutation(len(files))][:most]
    if rng.random() < truncation and len(chosen) > 2:
        chosen = chosen[: rng.integers(2, len(chosen))]  # the bound is exclusive, as in the authors' code
    return chosen


def drops(augmentation: Rates, rng: np.random.Generator) -> tuple[bool, bool]:
    """Draw (drop the references, drop the text) from one number, so that the cases exclude each other."""
    image, text = augmentation.drop_image, augmentation.drop_text
    draw = rng.random()
    drop_image = draw < image or image + text <= draw < image + text + augmentation.drop_both
    return drop_image, image <= draw < image + text + augmentation.drop_both


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor (3, H, W) in -1..1."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return pixels.permute(2, 0, 1).contiguous() * 2 - 1
