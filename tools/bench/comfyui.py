"""What Apply EasyRef adds to a step of SDXL in ComfyUI: full-size UNet with random weights, float32, on this machine's CPU.

    python tools/bench/comfyui.py [--pixels 256,512] [--pairs 5] [--json FILE]

A step is a sampling of one step with classifier-free guidance, through the host's own guider: one call of the UNet on two
rows. With and without references in turn, and the time inside the 70 terms as part of their own step. The LoRA is left out:
the host merges it into the weights before it samples. About 11 GB of memory are needed, and a ComfyUI (COMFYUI_PATH).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import find_hosts, host_version

TOKENS, TEXT, POOLED = (1, 64, 2048), (1, 77, 2048), (1, 1280)
LATE = 0.9  # a window from there on is not reached in the first step


class Spent:
    """Seconds in the 70 patches, and of them in the text's attention."""

    patches = text = 0.0
    terms = 0  # computed


def full_size_sdxl() -> Any:
    """A ModelPatcher of SDXL in float32 with random weights."""
    from devkit.host.full_size_unets import SDXL, on_meta

    weights = import_module("tools.bench.random_weights")
    model = on_meta(SDXL | {"dtype": torch.float32})
    weights.materialised(model.model.diffusion_model, "cpu", torch.float32)
    return model


def with_references(pack: ModuleType, model: Any, start: float = 0.0) -> Any:
    """The model as Apply EasyRef gives it at weight 1, from `start` on, with random tokens of a checkpoint for it."""
    unet_patch = import_module(f"{pack.__name__}.nodes.unet_patch.condition")
    held = import_module(f"{pack.__name__}.nodes.host.key_values")
    layout = import_module(f"{pack.__name__}.easyref_core.unet.layout")
    widths = unet_patch.cross_attention_widths(model)
    sites = tuple(layout.in_processor_order(widths))
    key_values = [tuple(torch.randn(2, TOKENS[1], widths[site]) for _ in "kv") for site in sites]
    checkpoint = SimpleNamespace(sites=sites, widths=widths)
    easyref = SimpleNamespace(
        model=SimpleNamespace(checkpoint=checkpoint),
        key_value_rows=lambda _: held.KeyValueTable(key_values, 1),
        require_same_checkpoint=lambda _: None,
        forget_with=lambda _: None,
    )
    tokens = SimpleNamespace(conditional=torch.empty(TOKENS), unconditional=torch.empty(TOKENS))
    settings = unet_patch.ApplySettings(start_percent=start, lora_strength=0.0)
    return unet_patch.condition(model, easyref, tokens, settings)


def stepping(model: Any, pixels: int) -> Callable[[], torch.Tensor]:
    """A sampling of one step."""
    import comfy.samplers

    random = torch.Generator().manual_seed(0)

    def prompt() -> list:
        return [
            [torch.randn(TEXT, generator=random), {"pooled_output": torch.randn(POOLED, generator=random)}]
        ]

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(), prompt())
    guider.set_cfg(5.0)
    noise = torch.randn(1, 4, pixels // 8, pixels // 8, generator=random)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 1)

    def step() -> torch.Tensor:
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)

    return step


@contextmanager
def watched(pack: ModuleType) -> Iterator[None]:
    """Add up in Spent what the patches take meanwhile."""
    site_patch = import_module(f"{pack.__name__}.nodes.unet_patch.site_patch")
    patch, text, term = (
        site_patch.SitePatch.__call__,
        site_patch.text_attention,
        site_patch.reference_attention,
    )

    def clocked(call: Callable[..., Any], name: str, *args: Any) -> Any:
        start = time.perf_counter()
        out = call(*args)
        setattr(Spent, name, getattr(Spent, name) + time.perf_counter() - start)
        return out

    def counted(*args: Any) -> Any:
        Spent.terms += 1
        return term(*args)

    Spent.patches = Spent.text = Spent.terms = 0
    site_patch.SitePatch.__call__ = lambda *args: clocked(patch, "patches", *args)
    site_patch.text_attention = partial(clocked, text, "text")
    site_patch.reference_attention = counted
    try:
        yield
    finally:
        site_patch.SitePatch.__call__, site_patch.text_attention = patch, text
        site_patch.reference_attention = term


def measure(pack: ModuleType, host: str, pixels: tuple[int, ...], pairs: int) -> list[Any]:
    """Rows for each size, then what is left of the patches outside their window."""
    from torch.utils.flop_counter import FlopCounterMode

    from tools.bench.rows import Row
    from tools.bench.timing import interleaved, seconds
    from tools.bench.unet import IN_TERMS, NOTHING, SLOWER, terms_row

    say = partial(print, flush=True)
    say("making random weights")
    bare = full_size_sdxl()
    patched, later = with_references(pack, bare), with_references(pack, bare, LATE)
    rows = []
    for side in pixels:
        name = f"ComfyUI {host}, SDXL step at {side} x {side}, CFG, float32"
        say(f"{name}: unpatched, patched")
        step = stepping(patched, side)
        found = interleaved(stepping(bare, side), step, pairs, say)
        rows.append(found.row(f"{name}; patched to unpatched", SLOWER))
        whole, terms = [], []
        for _ in range(pairs):
            with watched(pack):
                whole.append(seconds(step))
            terms.append(Spent.patches - Spent.text)
        rows.append(terms_row(name, whole, terms, IN_TERMS))
    counts = []
    for model in (bare, later):
        with FlopCounterMode(display=False) as operations:
            stepping(model, pixels[0])()
        counts.append(operations.get_total_flops())
    label = f"ComfyUI {host}: operations added outside the window, counted at {pixels[0]} x {pixels[0]}"
    return [*rows, Row(label, counts[1] - counts[0], "operations", wanted=NOTHING)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", default="256,512", help="sides of the pictures")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file to write the rows to")
    parsed = parser.parse_args()

    complete_cpu_torch()
    host = find_hosts()[0]
    enter_host(host)
    pack = load_pack()
    logging.getLogger().setLevel(logging.WARNING)  # the host tells of every model it loads
    from tools.bench.machine import describe
    from tools.bench.report import markdown, write_json

    machine = describe()
    with torch.inference_mode():
        sides = tuple(int(side) for side in parsed.pixels.split(","))
        rows = measure(pack, host_version(host), sides, parsed.pairs)
    print(f"\n{markdown(machine, rows)}")
    if parsed.json:
        write_json(parsed.json, machine, rows)


if __name__ == "__main__":
    main()
