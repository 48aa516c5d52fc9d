"""Trains the IP-Adapter of the creatures, and its image encoder.

    python -m easyref_core.tiny.creatures.baselines runs/creatures/baselines --base runs/creatures/base

The IP-Adapter has as many updates of as many images as EasyRef's three stages together. Files that exist
already are skipped. A LoRA is trained for each group when its images are generated.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from ...mrbench.methods.ip_adapter import load_image_encoder
from ...mrbench.methods.ip_adapter_training import IPAdapterTraining, train_ip_adapter
from ...training.base_model import BaseModel
from ..optimizer import Log, Training, complete_folder, timed
from .dataset import draw_dataset
from .examples import COUNT, DATASET_SEED, SingleCreatures
from .image_encoder import pretrain_image_encoder
from .recipe import VIEWS

ENCODER = "image_encoder"
ENCODER_TRAINING = Training(steps=4000, batch=64, lr=2e-3, seed=5)
IP_ADAPTER_TRAINING = IPAdapterTraining(steps=2500, batch=16, lr=5e-4)


def make_image_encoder(folder: Path, log: Log) -> Path:
    """Train the image encoder if it does not exist, and return its folder."""
    if not (folder / ENCODER).is_dir():
        with complete_folder(folder / ENCODER) as partial:
            dataset = draw_dataset(DATASET_SEED, COUNT, VIEWS)
            pretrain_image_encoder(dataset, partial, ENCODER_TRAINING, log)
    return folder / ENCODER


def make_ip_adapter(base: Path, folder: Path, seed: int, log: Log) -> Path:
    """Train the IP-Adapter of a training seed if it does not exist, and return its file."""
    file = folder / f"ip_adapter_{seed}.safetensors"
    if not file.is_file():
        model = BaseModel.load(base)
        images = SingleCreatures(model, draw_dataset(DATASET_SEED, COUNT, 1), seed)
        training = replace(IP_ADAPTER_TRAINING, seed=seed)
        train_ip_adapter(model, load_image_encoder(folder / ENCODER), images, file, training, log=timed(log))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m easyref_core.tiny.creatures.baselines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="folder for the weights")
    parser.add_argument("--base", type=Path, required=True, help="folder of the creatures' SDXL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    make_image_encoder(arguments.folder, log.info)
    for seed in arguments.seeds:
        make_ip_adapter(arguments.base, arguments.folder, seed, log.info)


if __name__ == "__main__":
    main()
