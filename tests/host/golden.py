"""The golden data, and what the pack makes of it inside the host."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CHECKPOINT = GOLDEN / "easyref.safetensors"
MLLM = GOLDEN / "mllm"
SETTINGS: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
SIZE = SETTINGS["cond_image_size"]


def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def references() -> tuple[torch.Tensor, ...]:
    """The three references as ComfyUI's IMAGE, each (1, height, width, 3) in 0..1."""
    images = [
        Image.open(GOLDEN / "references" / f"{i}.png").convert("RGB") for i in range(SETTINGS["images"])
    ]
    return tuple(torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None] for image in images)


def part(pack: ModuleType, name: str) -> ModuleType:
    """A module of the loaded pack, such as nodes.unet_patch."""
    import importlib

    return importlib.import_module(f"{pack.__name__}.{name}")


def load(pack: ModuleType, precision: str = "auto") -> Any:
    """The golden checkpoint as the loader node loads it."""
    return part(pack, "nodes.mllm_patcher").load_hosted(CHECKPOINT, MLLM, MLLM, precision, None)


def tokens(pack: ModuleType, easyref: Any) -> Any:
    """Reference tokens of the golden group, through the nodes' own methods."""
    context = easyref.encode(
        [image[0] for image in references()], SETTINGS["prompt"], instruction(pack), SIZE
    )
    return easyref.aggregate(context)


def instruction(pack: ModuleType) -> str:
    return part(pack, "easyref_core").INSTRUCTION


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error, ||found - wanted|| / ||wanted||."""
    found = found.detach().float().cpu().as_subclass(torch.Tensor)
    return ((found - wanted).norm() / wanted.norm()).item()
