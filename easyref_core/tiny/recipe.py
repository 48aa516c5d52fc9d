"""The recipe of the shipped tiny model: every step, size and seed (run by tools/train_tiny.py)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .classifier import to_tensor, train_classifier
from .dataset import draw_dataset
from .optimizer import Log, Training, complete_folder, timed
from .qwen2_vl import pretrain_qwen2_vl
from .sdxl import create_sdxl, pretrain_sdxl, shapes_caption
from .tokenizer import train_mllm_tokenizer
from .vae import pretrain_vae, principal_components, project, reconstruct
from .worlds import BASE, SHAPES

VAE_TRAINING = Training(steps=3200, batch=16, lr=2e-3, seed=0)
CLASSIFIER_TRAINING = Training(steps=1500, batch=128, lr=2e-3, seed=0)
VISION_TRAINING = Training(steps=3000, batch=64, lr=3e-3, seed=0)
QWEN2_VL_TRAINING = Training(steps=1500, batch=32, lr=2e-3, seed=0)
TEXT_TRAINING = Training(steps=1500, batch=64, lr=2e-3, seed=0)
SDXL_TRAINING = Training(steps=2400, batch=96, lr=1.5e-3, seed=0)
DATASET_SEED = 0
VAE_COPIES, COPIES = 2, 6  # images of each combination: for the VAE, and for the rest
BASIS_IMAGES = 2000  # from which the principal components are computed


def make_base(folder: Path, log: Log) -> None:
    """Train the tiny SDXL, the tiny Qwen2-VL and the classifier; complete parts in the folder are skipped.

    Held-out combinations are in the training of the classifier only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base, mllm, classifier = folder / BASE, folder / SHAPES.mllm, folder / SHAPES.judge
    log = timed(log)
    work = base if base.is_dir() else folder / f"{BASE}.partial"
    pixels = to_tensor(draw_dataset(DATASET_SEED, VAE_COPIES).images)
    basis = principal_components(pixels[:BASIS_IMAGES])
    if not (work / "vae").is_dir():
        with complete_folder(work / "vae") as vae:
            pretrain_vae(pixels, basis, vae, VAE_TRAINING, log)
    if not classifier.is_file():
        accuracy = train_classifier(classifier, CLASSIFIER_TRAINING, partial(reconstruct, work / "vae"), log)
        log("classifier accuracy: " + ", ".join(f"{name} {part:.4f}" for name, part in accuracy.items()))
    if not (mllm / "model.safetensors").is_file():
        train_mllm_tokenizer(mllm)
        dataset = draw_dataset(DATASET_SEED, COPIES)
        pretrain_qwen2_vl(dataset, mllm, QWEN2_VL_TRAINING, VISION_TRAINING, log)
    if work != base:
        create_sdxl(work, SDXL_TRAINING.seed)
        dataset = draw_dataset(DATASET_SEED, COPIES)
        latents = project(to_tensor(dataset.images), basis)
        pretrain_sdxl(latents, partial(shapes_caption, dataset), work, TEXT_TRAINING, SDXL_TRAINING, log=log)
        work.rename(base)
