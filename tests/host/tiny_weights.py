"""A stand-in for the tiny model's folder: the layout of the shipped one, other sizes, random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from devkit.host import golden
from easyref_core.tiny.tokenizer import PROMPT_TOKENS, VOCABULARY, train_clip_tokenizer


def write(folder: Path) -> None:
    """Write the folder: a diffusers SDXL pipeline, an EasyRef checkpoint that fits it, and its Qwen2-VL.

    UNet, checkpoint and Qwen2-VL are those of tests/golden. VAE and text encoders are drawn here.
    """
    base = folder / "base"
    shutil.copytree(golden.GOLDEN / "unet", base / "unet")
    shutil.copy(golden.CHECKPOINT, folder / "tiny_easyref.safetensors")
    shutil.copytree(golden.MLLM, folder / "tiny-qwen2-vl")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    _write_schedule(base / "scheduler")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _write_vae(base / "vae")
        _write_text_encoders(base)
    for part in ("tokenizer", "tokenizer_2"):
        train_clip_tokenizer(base / part)


def _write_schedule(folder: Path) -> None:
    from diffusers import DDPMScheduler

    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(folder)


def _write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": [32, 64, 64, 96], "norm_num_groups": 16, "layers_per_block": 1}
    vae = AutoencoderKL(latent_channels=4, scaling_factor=0.7, sample_size=64, **kinds, **sizes)
    vae.half().save_pretrained(folder)


def _write_text_encoders(base: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": VOCABULARY}
    config = CLIPTextConfig(max_position_embeddings=PROMPT_TOKENS, projection_dim=32, **sizes, **ids)
    CLIPTextModel(config).half().save_pretrained(base / "text_encoder")
    CLIPTextModelWithProjection(config).half().save_pretrained(base / "text_encoder_2")
