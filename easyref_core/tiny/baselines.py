"""Trains the baselines of the tiny benchmark: CLIP, and the IP-Adapter that uses its image encoder.

    python -m easyref_core.tiny.baselines runs/tiny/baselines --base runs/tiny/base

The IP-Adapter has as many updates of as many images as EasyRef's three stages together, from a dataset three
times as large. Files that exist already are skipped. A LoRA is trained for each group when its images are
generated.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from ..mrbench.methods.ip_adapter import load_image_encoder
from ..mrbench.methods.ip_adapter_training import IPAdapterTraining, train_ip_adapter
from ..training.base_model import BaseModel
from .clip import pretrain_clip
from .dataset import draw_dataset
from .examples import SingleImages
from .optimizer import Log, Training, complete_folder, timed
from .recipe import COPIES, DATASET_SEED
from .worlds import BASE, SHAPES

CLIP = "clip"
CLIP_TRAINING = Training(steps=3000, batch=96, lr=1e-3, seed=5)
IP_ADAPTER_TRAINING = IPAdapterTraining(steps=3800, batch=16, lr=5e-4)


def make_clip(folder: Path, log: Log) -> Path:
    """Train the tiny CLIP if it does not exist, and return its folder."""
    if not (folder / CLIP).is_dir():
        with complete_folder(folder / CLIP) as partial:
            accuracy = pretrain_clip(draw_dataset(DATASET_SEED, COPIES), partial, CLIP_TRAINING, log)
        log("zero-shot accuracy: " + ", ".join(f"{name} {part:.3f}" for name, part in accuracy.items()))
    return folder / CLIP


def make_ip_adapter(base: Path, folder: Path, seed: int, log: Log) -> Path:
    """Train the IP-Adapter of a training seed if it does not exist, and return its file."""
    file = folder / f"ip_adapter_{seed}.safetensors"
    if not file.is_file():
        model = BaseModel.load(base)
        images = SingleImages(model, draw_dataset(DATASET_SEED, COPIES), seed)
        encoder, training = load_image_encoder(folder / CLIP), replace(IP_ADAPTER_TRAINING, seed=seed)
        train_ip_adapter(model, encoder, images, file, training, log=timed(log))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m easyref_core.tiny.baselines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="folder for the weights")
    parser.add_argument("--base", type=Path, default=SHAPES.weights / BASE, help="folder of the tiny SDXL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    make_clip(arguments.folder, log.info)
    for seed in arguments.seeds:
        make_ip_adapter(arguments.base, arguments.folder, seed, log.info)


if __name__ == "__main__":
    main()
