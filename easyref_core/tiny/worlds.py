"""The two procedural datasets, and where the models that are trained on each of them are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BASE = "base"  # the diffusers SDXL in a folder of weights


@dataclass(frozen=True)
class World:
    """Names of the files that ship with the pack in one folder of weights, and what Encode needs to know."""

    weights: Path  # the shipped folder
    easyref: str  # checkpoint of the third stage, with the MLLM's weights
    mllm: str  # folder with the MLLM's configuration and tokenizer
    judge: str  # scores images
    size: int  # pixels of a reference for the MLLM


SHAPES = World(
    weights=Path(__file__).absolute().parent / "weights",
    easyref="tiny_easyref.safetensors",
    mllm="tiny-qwen2-vl",
    judge="classifier.safetensors",
    size=84,
)
CREATURES = World(
    weights=Path(__file__).absolute().parent / "creatures" / "weights",
    easyref="creatures_easyref.safetensors",
    mllm="creatures-qwen2-vl",
    judge="judge.safetensors",
    size=64,
)
WORLDS = {"creatures": CREATURES, "shapes": SHAPES}
