"""Memory of an animation's reference tokens at SDXL's full size: tokens, K and V held at once, K and V of one
window.

    python tools/bench/frames.py [--frames 16,100,300,4096] [--window 16]

The projections have random weights in bfloat16, K and V are made in float32 on the CPU and placed in float16,
as for a UNet in half precision. A window is a UNet call of both sides. About 4 GB of memory and a ComfyUI
(COMFYUI_PATH) are needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import find_hosts

TOKENS, WIDTH = 64, 2048  # of one frame's reference tokens
GIB = 2**30


def full_size_projections(pack: ModuleType) -> tuple[Any, list[int]]:
    """K and V projections of SDXL's 70 cross-attentions, with random weights in bfloat16, and the width of
    each.
    """
    layout = import_module(f"{pack.__name__}.easyref_core.unet.layout")
    attention = import_module(f"{pack.__name__}.easyref_core.unet.reference_attention")
    narrow = {("input", 4), ("input", 5), ("output", 3), ("output", 4), ("output", 5)}
    inner = [640 if (site.block, site.number) in narrow else 1280 for site in layout.sdxl_sites()]
    return attention.KVProjections(inner, WIDTH, dtype=torch.bfloat16), inner


class Sampling:
    """A model_sampling of which only the order of its sigmas matters here."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


def injection_of(pack: ModuleType, frames: int) -> Any:
    """An Apply EasyRef of so many rows of random tokens, all the same on the unconditional side."""
    key_values = import_module(f"{pack.__name__}.nodes.host.key_values")
    injection = import_module(f"{pack.__name__}.nodes.unet_patch.injection")
    layers = import_module(f"{pack.__name__}.easyref_core.unet.layer_weights")
    projections, inner = full_size_projections(pack)
    projections.float()

    def project(row: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.inference_mode():
            return projections(row)

    tokens, row_numel = torch.randn(1 + frames, TOKENS, WIDTH), 2 * TOKENS * sum(inner)
    if len(tokens) * row_numel * 4 <= key_values.MAX_TABLE_BYTES:
        rows = key_values.KeyValueTable(key_values.project_rows(tokens, project), 1)
    else:
        rows = key_values.KeyValueProjector(tokens, 1, row_numel, project)
    strength = injection.Strength(1.0, (0.0, 1.0), (1.0,) * len(inner))
    return injection.Injection(rows, strength, (layers.OWN,) * len(inner))


def measure(pack: ModuleType, frames: int, window: int) -> SimpleNamespace:
    """Bytes of the tokens, of all K and V in float32, and of the K and V that a window leaves on its device;
    seconds it took.
    """
    layout = import_module(f"{pack.__name__}.nodes.unet_patch.batch_layout")
    crop = import_module(f"{pack.__name__}.easyref_core.unet.masks").whole(128, 128)
    applied = injection_of(pack, frames)
    first = (frames - window) // 2
    rows = tuple(
        layout.Row(side, i, first + i, crop) for side in (True, False) for i in range(min(window, frames))
    )
    step = import_module(f"{pack.__name__}.nodes.unet_patch.step")
    call = step.UNetCall(Sampling(), torch.device("cpu"), torch.float16)
    start = time.perf_counter()
    active = applied.at(0.5, rows, call)
    took = time.perf_counter() - start
    placed = {id(tensor): tensor.nbytes for pair in active.key_values for tensor in pair}
    return SimpleNamespace(
        tokens=(1 + frames) * TOKENS * WIDTH * 4,
        held=(1 + frames) * applied.key_values.row_numel * 4,
        window=sum(placed.values()) + applied.key_values.resident_rows * applied.key_values.row_numel * 2,
        told=applied.nbytes(min(window, frames), 2),
        seconds=took,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", default="16,100,300,4096")
    parser.add_argument("--window", type=int, default=16, help="frames that are sampled at a time")
    parsed = parser.parse_args()
    complete_cpu_torch()
    enter_host(find_hosts()[0])
    pack = load_pack()
    limit = import_module(f"{pack.__name__}.nodes.host.key_values").MAX_TABLE_BYTES
    heads = "frames, tokens, K and V of all frames, of these held in RAM, on the device, told to the host, time".split(
        ", "
    )
    print(f"| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}")
    for frames in map(int, parsed.frames.split(",")):
        found = measure(pack, frames, parsed.window)
        held = found.held if found.held <= limit else 0
        cells = [found.tokens, found.held, held, found.window, found.told]
        sizes = " | ".join(f"{size / GIB:.3f} GiB" for size in cells)
        print(f"| {frames} | {sizes} | {found.seconds:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
