"""Tiny models and data of the training tests: a random diffusers SDXL folder, and the golden MLLM."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.mllm.instructions import INSTRUCTION, image_token_id, tokenize
from easyref_core.mllm.preprocess import preprocess
from easyref_core.mllm.tokenizer import load_tokenizer
from easyref_core.tiny import sdxl, vae
from easyref_core.training.batches import Batch, Sample, collate, generator, new_seed, row_at
from easyref_core.training.config import Data, Samples, Settings, Stream, Validation
from easyref_core.training.examples import Augmentation

if TYPE_CHECKING:
    from easyref_core.mllm.config import EasyRefConfig

MakeSettings = Callable[..., Settings]  # type of the fixture `settings`
Train = Callable[..., Path]  # type of the fixture `train_tiny`

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MLLM = GOLDEN / "mllm"
IMAGE_SIZE = 64  # pixels; latents are 8 x 8
REFERENCE = 84  # pixels of a reference for the MLLM
TOKENS = 6  # reference tokens
TEXT = 16  # width of each text encoder; the UNet's context is 2 x 16
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


def make_base(folder: Path, widths: tuple[int, int] = (TEXT, TEXT)) -> Path:
    """Write a diffusers SDXL folder: the golden UNet with a matching random VAE and text encoders.

    widths: of the text encoders, together the UNet's context.
    """
    from diffusers import AutoencoderKL, DDPMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    shutil.copytree(GOLDEN / "unet", folder / "unet")
    sizes = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "latent_channels": 4}  # the golden UNet's
    AutoencoderKL(**vae.CONFIG | sizes).save_pretrained(folder / "vae")
    # the golden UNet's conditioning on sizes: 6 x 8 values, and 80 - 48 = 32 of the pooled text
    sizes = sdxl.CONFIGS["text_encoders"] | {"intermediate_size": 32, "projection_dim": 32}
    sizes |= {"vocab_size": 56, "max_position_embeddings": 16, "num_hidden_layers": 3}
    sizes |= {"bos_token_id": 54, "eos_token_id": 55, "pad_token_id": 55}
    first, second = (CLIPTextConfig(**sizes | {"hidden_size": width}) for width in widths)
    CLIPTextModel(first).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        write_clip_tokenizer(folder / name, f"{ascii_lowercase},", model_max_length=16)
    schedule = sdxl.CONFIGS["scheduler"] | {"prediction_type": "epsilon"}  # as SDXL's
    DDPMScheduler(**schedule).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    return folder


def write_clip_tokenizer(folder: Path, letters: str, **settings: Any) -> None:
    """Write a CLIP tokenizer without merges: each letter is a token, and the last two tokens are special."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings |= {"tokenizer_class": "CLIPTokenizer", "bos_token": words[-2], "eos_token": words[-1]}
    settings |= {"pad_token": words[-1], "unk_token": words[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_image(seed: int, side: int = IMAGE_SIZE) -> Image.Image:
    """An image of coarse random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


class TinyExamples:
    """Examples of a fixed set of groups of 1 to 3 random images."""

    def __init__(self, config: EasyRefConfig, groups: int = 8, seed: int = 0) -> None:
        self.config, self.groups, self.seed = config, groups, seed
        self.tokenizer = load_tokenizer(MLLM)

    def __len__(self) -> int:
        return self.groups

    def batch(self, positions: range) -> Batch:
        rows = [row_at(position, len(self), self.seed) for position in positions]
        seeds = [new_seed(generator(position, self.seed)) for position in positions]
        return collate([self.sample(row) for row in rows], seeds)

    def images(self, positions: range) -> list[tuple[list[Image.Image], str]]:
        """The references and the prompt at each position."""
        return [self.group(row_at(position, len(self), self.seed)) for position in positions]

    def group(self, row: int) -> tuple[list[Image.Image], str]:
        """The references and the prompt of a row."""
        references = [random_image(10 * row + i, side=48 + 16 * i) for i in range(1 + row % 3)]
        return references, "abcdefgh"[: 1 + row % 5]

    def sample(self, row: int) -> Sample:
        references, prompt = self.group(row)
        patches, grid = preprocess(references, self.config, REFERENCE)
        counts = (grid.prod(dim=1) // self.config.merge_size**2).tolist()
        pixels = torch.from_numpy(np.array(random_image(10 * row + 9))).permute(2, 0, 1) / 127.5 - 1
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return Sample(
            target=pixels,
            prompt=prompt,
            patches=patches,
            grid=grid,
            input_ids=tokenize(self.tokenizer, INSTRUCTION + prompt, counts)[0],
            original_size=size,
            crop=(0, 0),
            target_size=size,
        )


# Settings of a run that starts from the golden checkpoint, whose LoRA is not zero.
GOLDEN_START = {
    "stage": "multi_reference",
    "start": GOLDEN / "easyref.safetensors",
    "num_tokens": 8,
    "lora_rank": 8,
}


class DyingExamples(TinyExamples):
    """Examples that kill their own process with SIGKILL at the first position beyond `last`."""

    def __init__(self, config: EasyRefConfig, last: int) -> None:
        super().__init__(config)
        self.last = last

    def batch(self, positions: range) -> Batch:
        if max(positions) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(positions)


class BrokenExamples(TinyExamples):
    """Examples of which those at positions 2 and 3, the second process's first, replace a broken row."""

    def batch(self, positions: range) -> Batch:
        broken = tuple(
            f"line {position}: x.png cannot be read" for position in positions if position in (2, 3)
        )
        return dataclasses.replace(super().batch(positions), broken=broken)


def config() -> EasyRefConfig:
    """Sizes of the tiny model."""
    return open_checkpoint(GOLDEN / "easyref.safetensors", MLLM).config


def settings(base: Path, **changes: Any) -> Settings:
    """Settings of a run of one update on the tiny model; `output` is required."""
    defaults = {
        "stage": "alignment",
        "base": base,
        "mllm": MLLM,
        "data": Data(procedural={}, augmentation=Augmentation(size=REFERENCE)),
        "updates": 1,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "num_tokens": TOKENS,
        "lora_rank": 4,
        "log_every": 1,
    }
    return Settings(**defaults | changes)


def resumable(base: Path, output: Path) -> Settings:
    """Settings of a run of 6 updates with a saved state after every second."""
    schedule = {"schedule": "cosine", "warmup": 2, "clip": 0.1, "learning_rate": 1e-2}
    return settings(base, output=output, updates=6, save_every=2, accumulation=2, **schedule)


def resumable_stream(base: Path, output: Path, shards: str) -> Settings:
    """Settings of `resumable` on shards, in buckets of native aspect, with two data loading processes."""
    rules = Augmentation(resolution=64, native=True, size=REFERENCE, truncation=0.4, max_length=None)
    data = Data(stream=Stream((shards,), partitions=2, buffer=8), augmentation=rules)
    return dataclasses.replace(resumable(base, output), data=data, workers=2)


def launched(base: Path, output: Path, **changes: Any) -> Settings:
    """Settings of a run that writes all that a run can write, in every update."""
    every = {
        "samples": Samples(every=1, count=1, steps=2),
        "validation": Validation(every=1, count=3, timesteps=(500,)),
        "save_every": 1,
        "export_every": 1,
    }
    return settings(base, output=output, accumulation=2, clip=0.1, **GOLDEN_START, **every, **changes)


def image_token() -> int:
    """Id of <|image_pad|> in the golden MLLM."""
    return image_token_id(load_tokenizer(MLLM))
