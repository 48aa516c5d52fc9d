"""The tiny benchmark's baselines that need a training of their own: CLIP, and the IP-Adapter that sees through it.

    python -m easyref_core.tiny.baselines runs/tiny_baselines

The IP-Adapter has as many updates of as many pictures as EasyRef's three stages together, from a pool
of three times as many drawings. What is
there already is kept. A LoRA is trained group by group, while painting.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

from ..mrbench.methods.ip_adapter import load_image_encoder
from ..mrbench.methods.ip_adapter_training import IPAdapterTraining, train_ip_adapter
from ..training.base_model import BaseModel
from .clip import pretrain_image_encoder
from .dataset import draw_pool
from .recipe import BASE, COPIES, POOL_SEED
from .single_images import SinglePictures

WEIGHTS = Path(__file__).parent / "weights"
CLIP, IP_ADAPTER = "clip", "ip_adapter.safetensors"
CLIP_TRAINING = {"steps": 3000, "batch": 96, "lr": 1e-3, "seed": 5}
IP_ADAPTER_TRAINING = IPAdapterTraining(steps=3800, batch=32, lr=5e-4, seed=6)
LOG_EVERY = 100


def make_clip(folder: Path, log: Callable[[str], None]) -> Path:
    """The tiny CLIP's folder."""
    if not (folder / CLIP).is_dir():
        making = folder / f"{CLIP}.partial"  # named when it is whole
        found = pretrain_image_encoder(draw_pool(POOL_SEED, COPIES), making, log=log, **CLIP_TRAINING)
        making.rename(folder / CLIP)
        log("zero-shot accuracy: " + ", ".join(f"{name} {part:.3f}" for name, part in found.items()))
    return folder / CLIP


def make_ip_adapter(base: Path, folder: Path, log: Callable[[str], None]) -> Path:
    """The tiny IP-Adapter, for the base in that folder; the CLIP has to be there."""
    file = folder / IP_ADAPTER
    if file.is_file():
        return file
    model = BaseModel.load(base)
    source = SinglePictures(model, draw_pool(POOL_SEED, COPIES), IP_ADAPTER_TRAINING.seed)
    started = time.monotonic()
    recent: list[float] = []

    def tell(step: int, loss: float) -> None:
        recent.append(loss)
        if len(recent) == LOG_EVERY:
            log(
                f"IP-Adapter {step + 1}: loss {sum(recent) / LOG_EVERY:.4f}, {time.monotonic() - started:.0f} s"
            )
            recent.clear()

    train_ip_adapter(model, load_image_encoder(folder / CLIP), source, file, IP_ADAPTER_TRAINING, tell)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m easyref_core.tiny.baselines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the weights go")
    parser.add_argument("--base", type=Path, default=WEIGHTS / BASE, help="the tiny SDXL's folder")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    make_clip(arguments.folder, log.info)
    make_ip_adapter(arguments.base, arguments.folder, log.info)


if __name__ == "__main__":
    main()
