"""CLIP text encoders of a diffusers SDXL folder, of any size, in plain torch.

ComfyUI's own encoders only accept CLIP's vocabulary. Those of transformers rename their weights between
releases, and initialise the ones they do not find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange

from .diffusers_folder import load_config, load_weights

if TYPE_CHECKING:
    from torch import Tensor

    Weights = Mapping[str, Tensor]


@torch.inference_mode()
def encode_text(base: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return SDXL's text conditioning of prompts: states (B, N, C) and pooled states (B, P).

    The states are the outputs of the second-to-last layers of both encoders, concatenated.
    """
    states = []
    for suffix in ("", "_2"):
        ids = token_ids(base / f"tokenizer{suffix}", prompts)
        folder = base / f"text_encoder{suffix}"
        stored = load_weights(folder, "model.safetensors")
        weights = {name.removeprefix("text_model."): weight for name, weight in stored.items()}
        config = load_config(folder)
        penultimate, last = hidden_states(
            ids, weights, config["num_hidden_layers"], config["num_attention_heads"]
        )
        states.append(penultimate)
    end = (ids == config["eos_token_id"]).int().argmax(dim=1)
    pooled = _norm(last, weights, "final_layer_norm")[torch.arange(len(ids)), end]
    return torch.cat(states, dim=-1), F.linear(pooled, weights["text_projection.weight"])


def token_ids(folder: Path, prompts: Sequence[str]) -> Tensor:
    """Return the token ids (B, N) of prompts, truncated or padded to the tokenizer's model_max_length."""
    from tokenizers import Tokenizer

    settings = load_config(folder, "tokenizer_config.json")
    length, pad = settings["model_max_length"], settings["pad_token"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    return torch.tensor([text.ids for text in tokenizer.encode_batch(list(prompts))])


def hidden_states(ids: Tensor, weights: Weights, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """Return the input and the output of the last layer for ids (B, N), both (B, N, C)."""
    states = weights["embeddings.token_embedding.weight"][ids]
    states = states + weights["embeddings.position_embedding.weight"][: ids.shape[1]]
    before = states
    for number in range(layers):
        before, states = states, _layer(states, weights, f"encoder.layers.{number}.", heads)
    return before, states


def _layer(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    normed = _norm(x, weights, f"{name}layer_norm1")
    q, k, v = (
        rearrange(_linear(normed, weights, f"{name}self_attn.{kind}_proj"), "b n (h d) -> b h n d", h=heads)
        for kind in "qkv"
    )
    attended = rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h n d -> b n (h d)")
    x = x + _linear(attended, weights, f"{name}self_attn.out_proj")
    inner = _linear(_norm(x, weights, f"{name}layer_norm2"), weights, f"{name}mlp.fc1")
    return x + _linear(inner * torch.sigmoid(1.702 * inner), weights, f"{name}mlp.fc2")  # quick GELU


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])
