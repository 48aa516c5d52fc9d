"""Options of the report's parts, and the files that one part writes for another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import easyref_core as er
from devkit import golden
from tools.bench.loading import TOKENIZER
from tools.bench.report import Options
from tools.bench.unet import ON_GPU

QUICK_PIXELS = 64
CHECKPOINT = "easyref.safetensors"  # in GpuOptions.folder


@dataclasses.dataclass(frozen=True)
class GpuOptions(Options):
    """Options of every part. With `quick`, the golden model takes the place of the full-size one."""

    folder: Path = Path()  # of the files that the parts share
    comfyui: Path | None = None  # a ComfyUI checkout

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the MLLM, as the nodes choose it."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def step_pixels(self) -> int:
        """Side of the image of a UNet's step."""
        return QUICK_PIXELS if self.quick else ON_GPU

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that is measured; weights.py writes the full-size one."""
        return golden.CHECKPOINT if self.quick else self.folder / CHECKPOINT

    def load_easyref(self) -> er.EasyRef:
        """The measured checkpoint on the device, in the compute dtype."""
        tokenizer = golden.MLLM if self.quick else TOKENIZER
        mllm = golden.MLLM if self.quick else None
        return er.load(self.checkpoint, mllm, self.device, self.dtype, tokenizer=tokenizer)
