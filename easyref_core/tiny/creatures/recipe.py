"""The recipe of the creatures' models: every step, size and seed (run by tools/train_tiny.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..classifier import to_tensor
from ..optimizer import Log, Training, complete_folder, timed
from ..recipe import BASIS_IMAGES
from ..sdxl import EMPTY_RATE, NAME_RATE, create_sdxl, pretrain_sdxl
from ..tokenizer import COMPARE, DESCRIBE, TEMPLATE, train_mllm_tokenizer
from ..vae import pretrain_vae, principal_components, project, reconstruct
from ..worlds import BASE, CREATURES
from .captions import all_captions, caption, words
from .dataset import Dataset, draw_dataset
from .descriptions import PARTS, all_descriptions, describe, described
from .examples import COUNT, DATASET_SEED
from .judge import train_judge
from .qwen2_vl import pretrain_qwen2_vl

VAE_TRAINING = Training(steps=3200, batch=16, lr=2e-3, seed=0)
JUDGE_TRAINING = Training(steps=2500, batch=64, lr=2e-3, seed=0)
VISION_TRAINING = Training(steps=2000, batch=64, lr=3e-3, seed=0)
QWEN2_VL_TRAINING = Training(steps=3000, batch=32, lr=1.5e-3, seed=0)
TEXT_TRAINING = Training(steps=1500, batch=64, lr=2e-3, seed=1)
SDXL_TRAINING = Training(steps=1800, batch=64, lr=1.5e-3, seed=1)
VIEWS = 6  # of each creature, for the MLLM
VAE_SCENES, SCENES = 4000, 1000  # views that the VAE and the UNet are trained on, beside the targets


def make_base(folder: Path, log: Log) -> None:
    """Train SDXL, Qwen2-VL and judge of the creatures; complete parts in the folder are skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    base, mllm, judge = folder / BASE, folder / CREATURES.mllm, folder / CREATURES.judge
    log = timed(log)
    work = base if base.is_dir() else folder / f"{BASE}.partial"
    dataset = draw_dataset(DATASET_SEED, COUNT, VIEWS)
    pixels = to_tensor(np.concatenate([dataset.targets, dataset.views[:VAE_SCENES, 0]]))
    basis = principal_components(pixels[:BASIS_IMAGES])
    if not (work / "vae").is_dir():
        with complete_folder(work / "vae") as vae:
            pretrain_vae(pixels, basis, vae, VAE_TRAINING, log)
    if not judge.is_file():
        errors = train_judge(judge, JUDGE_TRAINING, partial(reconstruct, work / "vae"), log)
        log("judge: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    if not (mllm / "model.safetensors").is_file():
        train_mllm_tokenizer(mllm, corpus())
        pretrain_qwen2_vl(dataset, mllm, QWEN2_VL_TRAINING, VISION_TRAINING, log)
    if work != base:
        create_sdxl(work, SDXL_TRAINING.seed, clip_corpus())
        latents = project(pixels[: len(dataset) + SCENES], basis)
        pretrain_sdxl(latents, partial(draw_caption, dataset), work, TEXT_TRAINING, SDXL_TRAINING, log=log)
        work.rename(base)


def draw_caption(dataset: Dataset, index: int, rng: np.random.Generator) -> str:
    """Draw a caption of one of the base's training images: the targets, then the first views."""
    if rng.random() < EMPTY_RATE:
        return ""
    named = rng.random(2) < NAME_RATE
    if index < len(dataset):
        said = rng.random(len(PARTS)) < NAME_RATE
        parts = describe(dataset.identities[index])
        parts = {part: parts[part] for part, is_said in zip(PARTS, said, strict=True) if is_said}
        ground, place = dataset.grounds[index], dataset.places[index]
        return described(parts) + words(ground if named[0] else None, place if named[1] else None)
    view = (index - len(dataset)) * dataset.views.shape[1]
    count = np.count_nonzero(dataset.view_scenes.radii[view])
    return caption(count, dataset.view_scenes.grounds[view] if named[0] else None)


def clip_corpus() -> Iterator[str]:
    """Texts of the base's tokenizers, in which every word occurs often enough to become a token."""
    for text in (*all_captions(), *all_descriptions()):
        yield from [text, f" {text}"] * 40


def corpus() -> Iterator[str]:
    """Texts of the MLLM's tokenizer, in which every word occurs often enough to become a token."""
    for text in all_captions():
        yield from [text, f"{text}. "] * 40
    yield from [*TEMPLATE, DESCRIBE, COMPARE] * 200
