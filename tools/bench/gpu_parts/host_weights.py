"""Writes SDXL's UNet with random weights as a file that ComfyUI's own node loads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import save_file

from tools.bench.comfyui import random_sdxl
from tools.bench.gpu_parts.host_step import enter
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import GIB, Row
from tools.bench.timing import Say

FILE = "random_sdxl.safetensors"  # in GpuOptions.folder


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Size of the file; none with `quick`, where a test node makes a tiny UNet."""
    if options.quick:
        say("  a tiny UNet takes the place of SDXL's")
        return
    enter(options)
    say("  writing SDXL's UNet in float16")
    path = options.folder / FILE
    save_file(random_sdxl(torch.float16).model.diffusion_model.state_dict(), path)
    yield Row("SDXL's UNet for ComfyUI, random weights, float16", path.stat().st_size / GIB, "GiB")
