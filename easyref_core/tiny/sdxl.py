"""The tiny SDXL: a UNet of SDXL's shape and two CLIP text encoders, pretrained to paint what captions name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..files.atomic_write import atomic_write, atomic_write_text
from ..training.base_model import BaseModel
from .images import NAMES, PICTURE, caption
from .tokenizer import PROMPT_TOKENS, VOCABULARY, train_clip_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from .dataset import Pool

WIDTH = 64  # channels of either text encoder, and of every stage of the UNet
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (WIDTH,) * 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (4, 4, 4),  # heads, of 16 channels each
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    "use_linear_projection": True,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": WIDTH,
    "max_position_embeddings": PROMPT_TOKENS,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
NAMING, SILENCE = 0.7, 0.1  # how often a caption names an attribute; how often it is empty
MOST_SNR = (
    5.0  # of the loss's weights, as in Min-SNR (arXiv 2303.09556): the small grid learns its colours sooner
)
AVERAGE = 0.999  # of the weights over the steps; the average is what is kept


def make_painter(folder: Path, seed: int) -> None:
    """Write a base folder with random weights beside the codec that is there already."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    for part in ("tokenizer", "tokenizer_2"):
        train_clip_tokenizer(folder / part)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # the tokenizer's
    text = CLIPTextConfig(**TEXT, **special)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    DDPMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ("diffusers", "DDPMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
        "tokenizer_2": ("transformers", "PreTrainedTokenizerFast"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False, **parts}
    atomic_write_text(folder / "model_index.json", json.dumps(index, indent=1) + "\n")


def pretrain_painter(
    pool: Pool, folder: Path, steps: int, batch: int, lr: float, seed: int, log: Callable[[str], None]
) -> None:
    """Train UNet and text encoders together on the pool and its captions, and save the average of their weights."""
    from diffusers.training_utils import EMAModel

    base = BaseModel.load(folder)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    trained = {part: getattr(base, part).train() for part in ("unet", "text_encoder", "text_encoder_2")}
    parameters = [p.requires_grad_() for module in trained.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    average = EMAModel(parameters, decay=AVERAGE, use_ema_warmup=True, power=0.75)
    latents = pool_latents(base, pool)
    signal = base.schedule.alphas_cumprod
    weights = (MOST_SNR * (1 - signal) / signal).clamp(max=1)  # min(snr, most) / snr
    for step in range(steps):
        picked = torch.randint(len(latents), (batch,))
        prompts = [_caption(pool.attributes[i], rng) for i in picked.tolist()]
        noise = torch.randn(batch, *latents.shape[1:])
        timesteps = torch.randint(len(signal), (batch,))
        noisy = base.schedule.add_noise(latents[picked], noise, timesteps)
        text = base.encode_text.__wrapped__(base, prompts)  # with gradients
        sizes = base.time_ids((PICTURE, PICTURE), (0, 0), (PICTURE, PICTURE), batch)
        conditions = {"text_embeds": text.pooled, "time_ids": sizes}
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = base.unet(noisy, timesteps, text.states, added_cond_kwargs=conditions).sample
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        optimizer.zero_grad()
        (errors * weights[timesteps]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        average.step(parameters)
        if step % 100 == 0 or step == steps - 1:
            log(f"painter {step}: noise error {errors.mean().item():.4f}")
    average.copy_to(parameters)
    for part, module in trained.items():
        module.eval().half().save_pretrained(folder / part)
    _prefix(folder / "text_encoder" / "model.safetensors")


def _prefix(file: Path) -> None:
    """Give CLIPTextModel's tensors the names transformers 4 reads as well; 5 leaves out their prefix."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    named = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    with atomic_write(file) as partial:
        save_file(named, partial, {"format": "pt"})


@torch.no_grad()
def pool_latents(base: BaseModel, pool: Pool) -> Tensor:
    """The pool's latents (M, 4, 8, 8), scaled."""
    pixels = torch.from_numpy(pool.pictures).movedim(-1, 1)
    return torch.cat([base.encode_images(part / 127.5 - 1) for part in pixels.split(256)])


def _caption(attributes: np.ndarray, rng: np.random.Generator) -> str:
    named = [name for name in NAMES if rng.random() < NAMING]
    return "" if rng.random() < SILENCE else caption(attributes, named)
