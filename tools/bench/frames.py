"""Memory of an animation's reference tokens at SDXL's full size: tokens, all K and V, K and V of one window.

    python tools/bench/frames.py [--frames 16,100,300,4096] [--window 16]

The projections have random weights in bfloat16, K and V are made in float32 on the CPU and placed in float16,
as for a UNet in half precision. A window is a UNet call of both sides. About 4 GB of memory and a ComfyUI
(COMFYUI_PATH) are needed.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import find_hosts
from tools.bench.report import GIB, numbers
from tools.bench.timing import seconds

TOKENS, WIDTH = 64, 2048  # of one frame's reference tokens
HEAD = "frames, tokens, K and V of all frames, of these held in RAM, on the device, told to the host, time"


class Sampling:
    """A model_sampling of which only the order of its sigmas matters here."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


def injection_of(pack: ModuleType, frames: int) -> Any:
    """An Apply EasyRef of so many rows of random tokens, all the same on the unconditional side."""
    from tools.bench.random_weights import sdxl_widths

    key_values = import_module(f"{pack.__name__}.nodes.host.key_values")
    injection = import_module(f"{pack.__name__}.nodes.unet_patch.injection")
    layers = import_module(f"{pack.__name__}.easyref_core.unet.layer_weights")
    attention = import_module(f"{pack.__name__}.easyref_core.unet.reference_attention")
    widths = list(sdxl_widths().values())
    projections = attention.KVProjections(widths, WIDTH, dtype=torch.bfloat16).float()
    project = torch.inference_mode()(projections.forward)
    tokens, row_numel = torch.randn(1 + frames, TOKENS, WIDTH), 2 * TOKENS * sum(widths)
    if len(tokens) * row_numel * 4 <= key_values.MAX_TABLE_BYTES:
        rows = key_values.KeyValueTable(key_values.project_rows(tokens, project), 1)
    else:
        rows = key_values.KeyValueProjector(tokens, 1, row_numel, project)
    strength = injection.Strength(1.0, (0.0, 1.0), (1.0,) * len(widths))
    return injection.Injection(rows, strength, (layers.DEFAULT_BRANCHES,) * len(widths))


def measure(pack: ModuleType, frames: int, window: int) -> tuple[list[int], float]:
    """Bytes in the order of HEAD, and the seconds that a window takes."""
    step = import_module(f"{pack.__name__}.nodes.unet_patch.step")
    layout = import_module(f"{pack.__name__}.nodes.unet_patch.batch_layout")
    crop = import_module(f"{pack.__name__}.easyref_core.unet.masks").full_crop(128, 128)
    limit = import_module(f"{pack.__name__}.nodes.host.key_values").MAX_TABLE_BYTES
    applied, count = injection_of(pack, frames), min(window, frames)
    first = (frames - window) // 2
    rows = tuple(layout.Row(side, i, first + i, crop) for side in (True, False) for i in range(count))
    call = step.UNetCall(Sampling(), torch.device("cpu"), torch.float16)
    active: list[Any] = []
    took = seconds(lambda: active.append(applied.active_at(0.5, rows, call)))
    placed = {id(tensor): tensor.nbytes for pair in active[0].key_values for tensor in pair}
    held = (1 + frames) * applied.key_values.row_numel * 4
    on_device = sum(placed.values()) + applied.key_values.resident_rows * applied.key_values.row_numel * 2
    tokens, in_ram = (1 + frames) * TOKENS * WIDTH * 4, held if held <= limit else 0
    return [tokens, held, in_ram, on_device, applied.nbytes(count, 2)], took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=numbers, default=(16, 100, 300, 4096))
    parser.add_argument("--window", type=int, default=16, help="frames that are sampled at a time")
    options = parser.parse_args()
    complete_cpu_torch()
    enter_host(find_hosts()[0])
    pack = load_pack()
    heads = HEAD.split(", ")
    print(f"| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}")
    for frames in options.frames:
        sizes, took = measure(pack, frames, options.window)
        cells = " | ".join(f"{size / GIB:.3f} GiB" for size in sizes)
        print(f"| {frames} | {cells} | {took:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
