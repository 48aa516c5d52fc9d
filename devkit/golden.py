"""The golden data (results of the authors' code on tiny random models) and the comparison with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from easyref_core.utils.images import black_image

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = GOLDEN / "easyref.safetensors"
MLLM = GOLDEN / "mllm"
UNET = GOLDEN / "unet"
LAYOUT = GOLDEN / "released_layout.json"
SETTINGS: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
PROMPT: str = SETTINGS["prompt"]
SIZE: int = SETTINGS["cond_image_size"]
EXACT = 1e-5  # largest relative error of a result that equals the authors'

Tensors = dict[str, torch.Tensor]


def references() -> list[Image.Image]:
    """The three golden references."""
    return [Image.open(GOLDEN / "references" / f"{i}.png") for i in range(SETTINGS["images"])]


def as_tensor(image: Image.Image) -> torch.Tensor:
    """An image in ComfyUI's form: (height, width, channels) in 0..1."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)


# References and prompt of each case of the golden data.
CASES: dict[str, Callable[[], tuple[list[Image.Image], str]]] = {
    "cond": lambda: (references(), PROMPT),
    "single": lambda: (references()[:1], PROMPT),
    "permuted": lambda: (references()[::-1], PROMPT),
    "uncond": lambda: ([black_image()], ""),
}


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error, ||result - expected|| / ||expected||."""
    result, expected = (torch.Tensor(t.detach().cpu()).float() for t in (result, expected))
    assert result.shape == expected.shape
    return ((result - expected).norm() / expected.norm()).item()


def checkpoint_tensors() -> Tensors:
    """The golden checkpoint's tensors under their stored names."""
    return load_file(CHECKPOINT)


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write tensors as safetensors and return the path."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_deepspeed(path: Path, tensors: Tensors) -> Path:
    """Write tensors as DeepSpeed's mp_rank_00_model_states.pt: the model under "module"."""
    trainer: dict[str, Any] = dict.fromkeys(("optimizer", "lr_scheduler", "frozen_param_shapes"))
    trainer |= {"shared_params": {}, "sparse_tensor_module_names": set(), "ds_version": "0.14.4"}
    trainer |= {"ds_config": {"zero_optimization": {"stage": 1}}, "skipped_steps": 0}
    trainer |= {"global_steps": 120000, "dp_world_size": 32}
    trainer["param_shapes"] = [{name: tensor.shape for name, tensor in tensors.items()}]
    torch.save({"module": tensors, "buffer_names": ["rotary_emb.inv_freq"]} | trainer, path)
    return path


def load_unet() -> UNet2DConditionModel:
    """The tiny SDXL-shaped UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(UNET, torch_dtype=torch.float32)


def empty_unet(
    down: Sequence[str], widths: Sequence[int], depths: int | Sequence[int], **options: object
) -> UNet2DConditionModel:
    """A UNet on the meta device, of these down blocks, their widths and their transformer blocks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            down_block_types=down,
            up_block_types=[block.replace("Down", "Up") for block in reversed(down)],
            block_out_channels=widths,
            transformer_layers_per_block=depths,
            attention_head_dim=8,
            cross_attention_dim=32,
            **options,
        )


def forward(unet: UNet2DConditionModel, expected: Tensors) -> torch.Tensor:
    """The UNet's noise prediction for the golden input, a batch of [unconditional, conditional]."""
    sdxl = {name: expected[f"unet.{name}"] for name in ("text_embeds", "time_ids")}
    inputs = (expected[f"unet.{name}"] for name in ("sample", "timestep", "encoder_hidden_states"))
    return unet(*inputs, added_cond_kwargs=sdxl).sample


predict = torch.no_grad()(forward)


def twice(expected: Tensors) -> Tensors:
    """The golden input with two images in each half of the batch."""
    return {name: t.repeat_interleave(2, dim=0) for name, t in expected.items() if name.startswith("unet.")}
