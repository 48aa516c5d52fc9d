"""Files of a diffusers model folder: configurations and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

if TYPE_CHECKING:
    from torch import Tensor


def load_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Load a JSON file of a model's folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def load_weights(folder: Path, name: str = "diffusion_pytorch_model.safetensors") -> dict[str, Tensor]:
    """Load a model's weights in float32."""
    return {key: weight.float() for key, weight in load_file(folder / name).items()}
