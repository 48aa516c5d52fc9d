"""A step of SDXL in ComfyUI with the nodes' patches against one without, in this process."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import host_version
from tools.bench.comfyui import SMALL, one_step, random_sdxl, with_references
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.gpu_parts.step import MAX_SLOWER, synchronization_rows
from tools.bench.report import GIB, Limit, Row
from tools.bench.timing import PeakMemory, Say, event_seconds, interleaved

WITHIN_RESERVED = Limit("<=", 1.0)


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Time, synchronizations inside the UNet, and memory beside what was reserved for the references."""
    pack = enter(options)
    bare, patched, name, pixels = models(pack, options)
    say(f"  {name}: unpatched, patched")
    steps = [one_step(model, pixels) for model in (bare, patched)]
    pairs = interleaved(*steps, options.pairs, say, event_seconds)
    yield pairs.row(f"{name}; patched to unpatched", None if options.quick else MAX_SLOWER)
    yield from synchronization_rows(name, bare.model.diffusion_model, *steps)
    peaks = []
    for step in steps:
        with PeakMemory(options.device) as peak:
            step()
        peaks.append(peak.added)
    if options.device == "cpu" or None in peaks:  # too small a share of a process's memory to be measured
        return
    reserved = reserved_bytes(patched, pixels)
    label = f"{name}: most memory that references add; to what was reserved before"
    added = peaks[1] - peaks[0]
    yield Row(label, added / GIB, "GiB", added / reserved, wanted=WITHIN_RESERVED)


def enter(options: GpuOptions) -> ModuleType:
    """Load the pack in the ComfyUI of the options."""
    complete_cpu_torch()
    enter_host(options.comfyui, cpu=options.device == "cpu")
    pack = load_pack()
    logging.getLogger().setLevel(logging.WARNING)  # the host logs every model it loads
    return pack


def models(pack: ModuleType, options: GpuOptions) -> tuple[Any, Any, str, int]:
    """ModelPatchers without and with references, the step's name, and the side of its image."""
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    pixels = options.step_pixels
    import comfy.model_management

    device = str(comfy.model_management.get_torch_device())  # with its index, which the host compares
    bare = random_sdxl(dtype, device, **(SMALL if options.quick else {}))
    version = host_version(options.comfyui)
    name = f"ComfyUI {version}, {options.unet_name}, step at {pixels} x {pixels}, CFG, {dtype}"
    return bare, with_references(pack, bare), name, pixels


def reserved_bytes(model: Any, pixels: int) -> float:
    """Bytes that the nodes reserve for K and V before a step: whole latents, of the host's size of one."""
    attachment = model.get_attachment("easyref")
    itemsize = model.model.get_dtype_inference().itemsize
    needed = sum(injection.nbytes(1, itemsize) for injection in attachment.injections)
    latent = model.model.memory_required([1, 4, pixels // 8, pixels // 8])
    return math.ceil(needed / latent) * latent
