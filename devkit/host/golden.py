"""The golden data, and the pack's results from it inside the host."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from devkit.golden import CHECKPOINT, GOLDEN, MLLM, SETTINGS, SIZE
from devkit.golden import error as error
from easyref_core.checkpoint.checkpoint import expected_shapes, open_checkpoint
from easyref_core.checkpoint.checkpoint import save as save_checkpoint


@functools.cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def references() -> tuple[torch.Tensor, ...]:
    """The three references as ComfyUI's IMAGE, each (1, height, width, 3) in 0..1."""
    files = (GOLDEN / "references" / f"{i}.png" for i in range(SETTINGS["images"]))
    images = (np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files)
    return tuple(torch.from_numpy(image / 255)[None] for image in images)


def part(pack: ModuleType, name: str) -> ModuleType:
    """A module of the loaded pack, such as nodes.unet_patch.condition."""
    return importlib.import_module(f"{pack.__name__}.{name}")


def node(pack: ModuleType, name: str) -> Any:
    """A node class of the loaded pack by its id, such as EasyRefApply."""
    return next(node for node in part(pack, "nodes").NODES if node.__name__ == name)


@torch.inference_mode()
def execute(pack: ModuleType, name: str, *inputs: Any, **named: Any) -> Any:
    """Run a node as the host runs it; -> its NodeOutput."""
    return node(pack, name).execute(*inputs, **named)


def load(pack: ModuleType, precision: str = "auto", checkpoint: Path = CHECKPOINT) -> Any:
    """A checkpoint with the golden MLLM folder, as the loader node loads it."""
    return part(pack, "nodes.host.hosted_model").load_hosted(checkpoint, MLLM, precision, None)


def write_random(folder: Path, layers: int, width: int, context: int = 4096) -> int:
    """Write a random checkpoint for the tiny UNet, random.safetensors, and its MLLM folder, random-qwen2-vl.

    layers, width: of the MLLM body; context: its maximal length in tokens. -> bytes of the weights in
    float32.
    """
    original = open_checkpoint(CHECKPOINT, MLLM)
    config = dataclasses.replace(
        original.config,
        hidden_size=width,
        intermediate_size=2 * width,
        body_layers=layers,
        max_positions=context,
        projector_width=width,
    )
    random = np.random.default_rng(0)
    shapes = expected_shapes(config, original.widths)
    tensors = {
        name: torch.ones(shape, dtype=torch.float16)
        if "norm" in name and name.endswith("weight")
        else torch.from_numpy((random.standard_normal(shape, np.float32) / 50).astype(np.float16))
        for name, shape in shapes.items()
    }
    save_checkpoint(folder / "random.safetensors", config, original.sites, tensors)

    settings = json.loads((MLLM / "config.json").read_text())
    settings |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers + 1}
    settings |= {"max_position_embeddings": context, "num_key_value_heads": config.kv_heads}
    mllm = folder / "random-qwen2-vl"
    shutil.copytree(MLLM, mllm, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    (mllm / "config.json").write_text(json.dumps(settings))
    return sum(4 * tensor.numel() for name, tensor in tensors.items() if not name.startswith("unet."))


def write_changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write the golden checkpoint with some of its tensors changed."""
    tensors = load_file(CHECKPOINT)
    change(tensors)
    save_file(tensors, path)


def write_other_tokens(path: Path) -> None:
    """Write a checkpoint that differs from the golden one in the learned reference tokens."""
    write_changed(path, lambda tensors: tensors["mllm_final_layer.reference_tokens"].mul_(2))


@torch.inference_mode()
def encode(pack: ModuleType, easyref: Any, prompt: str = SETTINGS["prompt"], group: Any = None) -> Any:
    """Context states of a group, by default the golden one, at the golden size."""
    images = [image[0] for image in group or references()]
    return easyref.encode(images, prompt, instruction(pack), SIZE)


@torch.inference_mode()
def tokens(pack: ModuleType, easyref: Any) -> Any:
    """Reference tokens of the golden group, through the nodes' own methods."""
    return easyref.aggregate(encode(pack, easyref))


def instruction(pack: ModuleType) -> str:
    return part(pack, "easyref_core").INSTRUCTION
