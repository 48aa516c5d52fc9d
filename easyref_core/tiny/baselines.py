"""Trains the baselines of the tiny benchmark: CLIP, and the IP-Adapter that uses its image encoder.

    python -m easyref_core.tiny.baselines runs/tiny_baselines

The IP-Adapter has as many updates of as many images as EasyRef's three stages together, from a dataset three
times as large. Files that exist already are skipped. A LoRA is trained for each group when its images are
generated.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..mrbench.methods.ip_adapter import load_image_encoder
from ..mrbench.methods.ip_adapter_training import IPAdapterTraining, train_ip_adapter
from ..training.base_model import BaseModel
from .clip import pretrain_clip
from .dataset import draw_dataset
from .examples import SingleImages
from .optimizer import Log, Training, complete_folder, timed
from .recipe import BASE, COPIES, DATASET_SEED

WEIGHTS = Path(__file__).parent / "weights"
CLIP, IP_ADAPTER = "clip", "ip_adapter.safetensors"
CLIP_TRAINING = Training(steps=3000, batch=96, lr=1e-3, seed=5)
IP_ADAPTER_TRAINING = IPAdapterTraining(steps=3800, batch=32, lr=5e-4, seed=6)


def make_clip(folder: Path, log: Log) -> Path:
    """Train the tiny CLIP if it does not exist, and return its folder."""
    if not (folder / CLIP).is_dir():
        with complete_folder(folder / CLIP) as partial:
            accuracy = pretrain_clip(draw_dataset(DATASET_SEED, COPIES), partial, CLIP_TRAINING, log)
        log("zero-shot accuracy: " + ", ".join(f"{name} {part:.3f}" for name, part in accuracy.items()))
    return folder / CLIP


def make_ip_adapter(base: Path, folder: Path, log: Log) -> Path:
    """Train the tiny IP-Adapter with the CLIP if it does not exist, and return its file."""
    file = folder / IP_ADAPTER
    if not file.is_file():
        model = BaseModel.load(base)
        images = SingleImages(model, draw_dataset(DATASET_SEED, COPIES), IP_ADAPTER_TRAINING.seed)
        encoder = load_image_encoder(folder / CLIP)
        train_ip_adapter(model, encoder, images, file, IP_ADAPTER_TRAINING, log=timed(log))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m easyref_core.tiny.baselines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="folder for the weights")
    parser.add_argument("--base", type=Path, default=WEIGHTS / BASE, help="folder of the tiny SDXL")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    make_clip(arguments.folder, log.info)
    make_ip_adapter(arguments.base, arguments.folder, log.info)


if __name__ == "__main__":
    main()
