"""CLIP's text encoders at the sizes of a diffusers folder, in plain torch.

The host's own has CLIP's vocabulary and no other; transformers' keep their weights under other names from one release to
the next, and initialise what they do not find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange

from .tiny_sdxl import config_of, read_json, weights_of

if TYPE_CHECKING:
    from torch import Tensor

    Weights = Mapping[str, Tensor]


@torch.inference_mode()
def encode_text(base: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What SDXL reads of each prompt: states (B, N, C), the last layer but one of both encoders, and pooled (B, P)."""
    states = []
    for number in ("", "_2"):
        ids = token_ids(base / f"tokenizer{number}", prompts)
        folder = base / f"text_encoder{number}"
        kept = weights_of(folder, "model.safetensors")
        weights = {name.removeprefix("text_model."): weight for name, weight in kept.items()}
        config = config_of(folder)
        last_but_one, last = hidden_states(
            ids, weights, config["num_hidden_layers"], config["num_attention_heads"]
        )
        states.append(last_but_one)
    end = (ids == config["eos_token_id"]).int().argmax(dim=1)
    pooled = _norm(last, weights, "final_layer_norm")[torch.arange(len(ids)), end]
    return torch.cat(states, dim=-1), F.linear(pooled, weights["text_projection.weight"])


def token_ids(folder: Path, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, N) of prompts, cut or padded to the length that the tokenizer is made for."""
    from tokenizers import Tokenizer

    settings = read_json(folder / "tokenizer_config.json")
    length, pad = settings["model_max_length"], settings["pad_token"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    return torch.tensor([text.ids for text in tokenizer.encode_batch(list(prompts))])


def hidden_states(ids: Tensor, weights: Weights, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """What goes into the last layer and what comes out of it, for ids (B, N): both (B, N, C)."""
    states = weights["embeddings.token_embedding.weight"][ids]
    states = states + weights["embeddings.position_embedding.weight"][: ids.shape[1]]
    before = states
    for number in range(layers):
        before, states = states, _layer(states, weights, f"encoder.layers.{number}.", heads)
    return before, states


def _layer(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    normed = _norm(x, weights, f"{name}layer_norm1")
    q, k, v = (
        rearrange(_linear(normed, weights, f"{name}self_attn.{part}_proj"), "b n (h d) -> b h n d", h=heads)
        for part in "qkv"
    )
    read = rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h n d -> b n (h d)")
    x = x + _linear(read, weights, f"{name}self_attn.out_proj")
    inner = _linear(_norm(x, weights, f"{name}layer_norm2"), weights, f"{name}mlp.fc1")
    return x + _linear(inner * torch.sigmoid(1.702 * inner), weights, f"{name}mlp.fc2")  # quick GELU


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])
