"""Single-file SDXL checkpoints of diffusers folders, in the names of the original code, for tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
}


def write_single_file(folder: Path, file: Path, marks: tuple[str, ...] = ()) -> Path:
    """Write a diffusers folder as one file. marks: names of empty tensors in it."""
    parts = {
        "model.diffusion_model.": _unet(_read(folder / "unet")),
        "first_stage_model.": _vae(_read(folder / "vae")),
        "conditioner.embedders.0.transformer.": _text(_read(folder / "text_encoder")),
        "conditioner.embedders.1.model.": _open_clip(_read(folder / "text_encoder_2")),
    }
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    tensors |= {mark: torch.tensor([]) for mark in marks}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def _read(folder: Path) -> Tensors:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def _replace(name: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def _unet(tensors: Tensors) -> Tensors:
    """Names of a UNet with two layers in each block."""
    attended = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.attentions", name)}
    return {_unet_name(name, attended): tensor for name, tensor in tensors.items()}


def _unet_name(name: str, attended: set[str]) -> str:
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        folder, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
        layer = 3 * block + number + first
        if kind == "downsamplers":
            return f"{folder}.{3 * block + 3}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"{folder}.{3 * block + 2}.{2 if match[2] in attended else 1}.{rest}"
        return f"{folder}.{layer}.{_inside(kind, rest)}"
    if match := re.match(r"mid_block\.(\w+)\.(\d)\.(.+)", name):
        layer = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{layer}.{_inside(match[1], match[3])[2:]}"
    head, _, leaf = name.rpartition(".")
    return f"{UNET[head]}.{leaf}"


def _inside(kind: str, rest: str) -> str:
    return f"0.{_replace(rest, RESNET)}" if kind == "resnets" else f"1.{rest}"


def _vae(tensors: Tensors) -> Tensors:
    blocks = 1 + max(int(match[1]) for name in tensors if (match := re.search(r"up_blocks\.(\d+)", name)))
    return dict(_vae_entry(name, tensor, blocks) for name, tensor in tensors.items())


def _vae_entry(name: str, tensor: Tensor, blocks: int) -> tuple[str, Tensor]:
    if ".mid_block.attentions.0." in name:
        name = _replace(name.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
        return name, tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
    words = {"down_blocks": "down", "resnets": "block", "conv_shortcut": "nin_shortcut"}
    words |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out"}
    return _replace(name, words), tensor


def _text(tensors: Tensors) -> Tensors:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _open_clip(tensors: Tensors) -> Tensors:
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    result = {"text_projection": tensors.pop("text_projection.weight").T}
    for name, tensor in tensors.items():
        if match := re.match(r"(.+\.self_attn\.)([qkv])_proj\.(weight|bias)", name):
            if match[2] == "q":
                rows = [tensors[f"{match[1]}{side}_proj.{match[3]}"] for side in "qkv"]
                result[_replace(f"{match[1]}in_proj_{match[3]}", OPEN_CLIP)] = torch.cat(rows)
        else:
            result[_replace(name, OPEN_CLIP)] = tensor
    return result
