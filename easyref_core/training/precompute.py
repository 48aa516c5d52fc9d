"""Runs the frozen models once over all rows and stores their outputs in shards (precomputed.py).

Each model is on the device only while its own part is computed. An interrupted run continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..mllm.instructions import image_token_id
from ..mllm.tokenizer import load_tokenizer
from . import precomputed
from .base_model import BaseModel
from .examples import RowExamples, to_tensor
from .precomputed import PARTS, context_key, file_key, text_key
from .rows import InvalidRow, read_rows
from .run import frozen_dtype, load_weights
from .shards import Shards, ShardWriter
from .trainable import TrainableEasyRef

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from .config import Settings
    from .initial import Weights
    from .rows import Row

log = logging.getLogger(__name__)

Entry = dict[str, "Tensor"]


class Job(NamedTuple):
    """One entry to compute. `compute` may raise InvalidRow."""

    key: str
    compute: Callable[[], Entry]


def precompute(settings: Settings, accelerator: Accelerator, parts: Iterable[str] | None = None) -> None:
    """Write the parts of a run to settings.precomputed; None: all that its stage can use.

    Raises ValueError for a part that changes in each epoch, and for a folder of other models or settings.
    """
    folder, data = settings.precomputed, settings.data
    if folder is None:
        raise ValueError("precomputed is not set. Set it to the folder to write to, in the YAML.")
    if accelerator.num_processes > 1:
        raise ValueError(f"precompute runs in one process, but {accelerator.num_processes} were started.")
    parts = precomputed.parts_of(settings) if parts is None else tuple(parts)
    rows = read_rows(data.rows, data.root, data.skip_rows, data.thorough, data.apply_exif)
    precomputed.require_parts(settings, parts, rows)
    dtype = frozen_dtype(accelerator)
    options = {"parked": BaseModel.MODELS, "config": settings.base_config}
    base = BaseModel.load(settings.base, accelerator.device, dtype, **options)
    weights = load_weights(settings, base)
    current = precomputed.provenance(settings, base, weights, dtype)
    finished, unusable = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / precomputed.MANIFEST).is_file():
        precomputed.require_provenance(folder, current)
        finished, unusable = precomputed.read_manifest(folder).values()
    elif any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has shards without a {precomputed.MANIFEST}. Choose an empty folder.")
    precomputed.write_manifest(folder, finished, unusable)
    options = {"tokenizer": load_tokenizer(settings.mllm), "augmentation": data.augmentation}
    examples = RowExamples(rows, data.root, weights.config, **options, apply_exif=data.apply_exif)
    for part in parts:
        with base.resident(*PARTS[part]):
            jobs = {
                "latents": lambda: latent_jobs(examples, base),
                "texts": lambda: text_jobs(rows, base),
                "contexts": lambda: context_jobs(examples, _encoder(settings, base, weights), accelerator),
            }[part]()
            unusable |= _run_jobs(folder, part, jobs)
        finished[part] = current[part]
        precomputed.write_manifest(folder, finished, unusable)


def _run_jobs(folder: Path, part: str, jobs: Iterable[Job]) -> dict[str, str]:
    """Compute the entries that are not stored, and return why those of some keys could not be computed."""
    from tqdm import tqdm

    stored, writer, unusable = Shards(folder, part), ShardWriter(folder, part), {}
    for job in tqdm(list(jobs), desc=part, dynamic_ncols=True):
        if job.key in stored:
            continue
        try:
            writer.add(job.key, job.compute())
        except InvalidRow as reason:
            log.warning("No %s: %s", part, reason)
            unusable[job.key] = str(reason)
    writer.flush()
    return unusable


def latent_jobs(examples: RowExamples, base: BaseModel) -> Iterable[Job]:
    """Latents of every file that can be a target."""

    def compute(file: str) -> Entry:
        crop = examples.crop(examples.load(file))
        mean, deviation = base.latent_moments(to_tensor(crop.image)[None])
        sizes = torch.tensor([crop.original_size, crop.corner, crop.target_size])
        return {"moments": torch.cat([mean, deviation]), "sizes": sizes}

    for file in precomputed.targets(examples.rows):
        yield Job(file_key(examples.root, file), lambda file=file: compute(file))


def text_jobs(rows: list[Row], base: BaseModel) -> Iterable[Job]:
    """States of every text."""

    def compute(text: str) -> Entry:
        states, pooled = base.encode_text([text])
        return {"states": states[0], "pooled": pooled[0]}

    for text in precomputed.texts(rows):
        yield Job(text_key(text), lambda text=text: compute(text))


def _encoder(settings: Settings, base: BaseModel, weights: Weights) -> TrainableEasyRef:
    """The frozen body on the device, detached from the UNet."""
    token = image_token_id(load_tokenizer(settings.mllm))
    model = TrainableEasyRef(
        base.unet, weights, settings.stage_spec, token, frozen_dtype=base.unet.dtype, body_device=base.device
    )
    model.attachment.remove()
    return model


def context_jobs(examples: RowExamples, model: TrainableEasyRef, accelerator: Accelerator) -> Iterable[Job]:
    """Context states of every reference and of the black image, each with every text of its rows."""

    def compute(file: str | None, text: str) -> Entry:
        images = None if file is None else examples.fit([examples.load(file)])
        patches, grid, ids = examples.mllm_inputs(images, text)
        mask = torch.ones_like(ids[None], dtype=torch.bool)
        inputs = (tensor.to(accelerator.device) for tensor in (patches, grid, ids[None], mask))
        with accelerator.autocast():  # as in the model's own forward pass
            states = model.context(*inputs)
        # the black image's grid is one tensor, and safetensors does not store one twice
        return {"states": states[0], "input_ids": ids, "grid": grid.clone()}

    for file, text in precomputed.contexts(examples.rows):
        key = context_key(examples.root, file, text)
        yield Job(key, lambda file=file, text=text: compute(file, text))
