"""Cost of Apply EasyRef in a step of SDXL in ComfyUI: full-size UNet, random weights, float32, on this CPU.

    python tools/bench/comfyui.py [--pixels 256,512] [--pairs 5] [--json FILE]

A step is a sampling of one step with classifier-free guidance, through the host's own guider: one call of the
UNet on two rows. With and without references in turn, and the time inside the 70 terms as part of their own
step. The LoRA is left out: the host merges it into the weights before it samples. About 11 GB of memory are
needed, and a ComfyUI (COMFYUI_PATH).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import find_hosts, host_version
from tools.bench.report import Options, Row, describe, parser, publish
from tools.bench.timing import interleaved, seconds

TOKENS, TEXT, POOLED = (1, 64, 2048), (1, 77, 2048), (1, 1280)
# in place of SDXL's sizes, for tests
SMALL: dict[str, Any] = {
    "model_channels": 64,
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
}
LATE = 0.9  # a window from there on is not reached in the first step


def random_sdxl(dtype: torch.dtype = torch.float32, load_device: str = "cpu", **sizes: Any) -> Any:
    """A ModelPatcher of SDXL with random weights. sizes: of its UNet that differ, such as SMALL."""
    from devkit.host.full_size_unets import SDXL, on_meta
    from tools.bench.random_weights import materialize

    model = on_meta(SDXL | {"dtype": dtype} | sizes, load_device)
    materialize(model.model.diffusion_model, "cpu", dtype)
    return model


def with_references(pack: ModuleType, model: Any, start: float = 0.0) -> Any:
    """The model as Apply EasyRef patches it at weight 1, from `start` on, with random tokens."""
    unet_patch = import_module(f"{pack.__name__}.nodes.unet_patch.condition")
    tables = import_module(f"{pack.__name__}.nodes.host.key_values")
    layout = import_module(f"{pack.__name__}.easyref_core.unet.layout")
    widths = unet_patch.cross_attention_widths(model)
    sites = tuple(layout.in_processor_order(widths))
    key_values = [tuple(torch.randn(2, TOKENS[1], widths[site]) for _ in "kv") for site in sites]
    checkpoint = SimpleNamespace(sites=sites, widths=widths)
    easyref = SimpleNamespace(
        model=SimpleNamespace(checkpoint=checkpoint),
        key_value_rows=lambda _: tables.KeyValueTable(key_values, 1),
        require_same_checkpoint=lambda _: None,
        clear_caches_on_detach=lambda _: None,
    )
    tokens = SimpleNamespace(conditional=torch.empty(TOKENS), unconditional=torch.empty(TOKENS))
    settings = unet_patch.ApplySettings(start_percent=start, lora_strength=0.0)
    return unet_patch.condition(model, easyref, tokens, settings)


def one_step(model: Any, pixels: int) -> Callable[[], torch.Tensor]:
    """A sampling of one step."""
    import comfy.samplers

    random = torch.Generator().manual_seed(0)
    guider = comfy.samplers.CFGGuider(model)
    prompts = [
        [[torch.randn(TEXT, generator=random), {"pooled_output": torch.randn(POOLED, generator=random)}]]
        for _ in ("positive", "negative")
    ]
    guider.set_conds(*prompts)
    guider.set_cfg(5.0)
    noise = torch.randn(1, 4, pixels // 8, pixels // 8, generator=random)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 1)
    latent = torch.zeros_like(noise)
    return lambda: guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)


@contextmanager
def clocked_patches(pack: ModuleType) -> Iterator[Counter[str]]:
    """Seconds that the 70 patches take in the block, and of these the text's attention."""
    site_patch = import_module(f"{pack.__name__}.nodes.unet_patch.site_patch")
    spent: Counter[str] = Counter()

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            out = call(*args)
            spent[name] += time.perf_counter() - start
            return out

        return run

    patch, text = site_patch.SitePatch.__call__, site_patch.text_attention
    with (
        mock.patch.object(site_patch.SitePatch, "__call__", clocked("patches", patch)),
        mock.patch.object(site_patch, "text_attention", clocked("text", text)),
    ):
        yield spent


def measure(pack: ModuleType, host: str, pixels: tuple[int, ...], pairs: int) -> list[Row]:
    """Rows for each size, then the operations of the patches outside their window."""
    from tools.bench.unet import MAX_IN_TERMS, MAX_SLOWER, NOTHING, terms_row

    say = partial(print, flush=True)
    say("making random weights")
    bare = random_sdxl()
    patched, later = with_references(pack, bare), with_references(pack, bare, LATE)
    rows = []
    for side in pixels:
        name = f"ComfyUI {host}, SDXL step at {side} x {side}, CFG, float32"
        say(f"{name}: unpatched, patched")
        step = one_step(patched, side)
        timed = interleaved(one_step(bare, side), step, pairs, say)
        rows.append(timed.row(f"{name}; patched to unpatched", MAX_SLOWER))
        steps, terms = [], []
        for _ in range(pairs):
            with clocked_patches(pack) as spent:
                steps.append(seconds(step))
            terms.append(spent["patches"] - spent["text"])
        rows.append(terms_row(name, steps, terms, MAX_IN_TERMS))
    counts = []
    for model in (bare, later):
        with FlopCounterMode(display=False) as operations:
            one_step(model, pixels[0])()
        counts.append(operations.get_total_flops())
    label = f"ComfyUI {host}: operations added outside the window, counted at {pixels[0]} x {pixels[0]}"
    return [*rows, Row(label, counts[1] - counts[0], "operations", wanted=NOTHING)]


def main() -> None:
    options = parser(__doc__).parse_args()
    complete_cpu_torch()
    host = find_hosts()[0]
    enter_host(host)
    pack = load_pack()
    logging.getLogger().setLevel(logging.WARNING)  # the host logs every model it loads
    machine = describe()
    with torch.inference_mode():
        rows = measure(pack, host_version(host), options.pixels, options.pairs or Options.pairs)
    publish(machine, rows, options.json)


if __name__ == "__main__":
    main()
