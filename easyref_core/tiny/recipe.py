"""How the shipped tiny model was made: every step, size and seed, in order. `python tools/train_tiny.py` runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from .classifier import to_tensor, train_classifier
from .dataset import draw_pool
from .qwen2_vl import pretrain_reader
from .sdxl import make_painter, pretrain_painter
from .tokenizer import train_mllm_tokenizer
from .vae import pretrain_codec

BASE, MLLM, CLASSIFIER = "base", "tiny-qwen2-vl", "classifier.safetensors"
EASYREF = "tiny_easyref.safetensors"
CODEC = {"steps": 3200, "batch": 32, "lr": 2e-3, "seed": 0}
SIGHT = {"steps": 3000, "batch": 64, "lr": 3e-3, "seed": 0}
READER = {"steps": 1500, "batch": 32, "lr": 2e-3, "seed": 0, "sight": SIGHT}
JUDGE = {"steps": 1500, "batch": 128, "lr": 2e-3, "seed": 0}
PAINTER = {"steps": 3600, "batch": 128, "lr": 1.5e-3, "seed": 0}
POOL_SEED = 0
FEW, COPIES = 2, 6  # pictures of each combination: for the codec, and for the rest


def make_base(folder: Path, log: Callable[[str], None]) -> None:
    """What stands for SDXL and Qwen2-VL, and the judge; parts that are there already are kept.

    None of it sees a held-out combination, but for the judge, which has to know them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base, mllm, judge = folder / BASE, folder / MLLM, folder / CLASSIFIER
    # Parts get their names when they are whole, so that what was stopped half-way is made again.
    making = base if base.is_dir() else folder / f"{BASE}.partial"
    started = time.monotonic()

    def tell(line: str) -> None:
        log(f"{time.monotonic() - started:6.0f} s  {line}")

    if not (making / "vae").is_dir():
        unnamed = making / "vae.partial"
        pretrain_codec(to_tensor(draw_pool(POOL_SEED, FEW).pictures), unnamed, log=tell, **CODEC)
        unnamed.rename(making / "vae")
    if not judge.is_file():
        accuracy = train_classifier(judge, through_codec=_codec(making / "vae"), log=tell, **JUDGE)
        tell("the judge is right about " + ", ".join(f"{name} {part:.4f}" for name, part in accuracy.items()))
    if not (mllm / "model.safetensors").is_file():
        train_mllm_tokenizer(mllm)
        pretrain_reader(draw_pool(POOL_SEED, COPIES), mllm, log=tell, **READER)
    if making != base:
        make_painter(making, PAINTER["seed"])
        pretrain_painter(draw_pool(POOL_SEED, COPIES), making, log=tell, **PAINTER)
        making.rename(base)


def _codec(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(folder), torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def through(pictures: torch.Tensor) -> torch.Tensor:
        return vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)

    return through
