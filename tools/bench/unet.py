"""Cost of the reference term in a step of SDXL's UNet: operations, time and memory.

Counted at full size without weights (unet_counts.py). Timed on diffusers' UNet with random weights: whole
steps in pairs, and, as a step's own time varies by more than the term takes, the time inside the 70 terms as
part of their own step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from easyref_core.training.full_size import FULL_SIZE
from easyref_core.training.full_size import unet as full_size_unet
from easyref_core.unet.diffusers_unet import ReferenceProcessor, cross_attention_widths
from tools.bench import unet_counts as counts
from tools.bench.random_weights import materialize
from tools.bench.report import GIB, Limit, Options, Row
from tools.bench.roofline import device_peak
from tools.bench.timing import Pairs, PeakMemory, Say, interleaved, seconds

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

MAX_ADDED, MAX_SLOWER = Limit("<=", 0.006), Limit("<=", 1.03)
MAX_IN_TERMS = Limit("<=", 0.03)
NOTHING = Limit("<=", 0)
COUNTED = (256, 512, 1024)  # pixels
ON_GPU = 1024  # pixels
SMALL: dict[str, Any] = {  # in place of SDXL's sizes, for --quick
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}
TOKENS = 64
BILLION = 1e9


def measure(options: Options, say: Say) -> list[Row]:
    """Rows of counted operations, then of time and memory; none where diffusers cannot be imported."""
    try:
        import diffusers  # noqa: F401
        from diffusers import UNet2DConditionModel  # noqa: F401
    except (ImportError, RuntimeError) as error:
        say(f"  left out: diffusers cannot be imported ({error}). Install the extra easyref[train].")
        return []
    return counted(options, say) + timed(options, say)


def counted(options: Options, say: Say) -> list[Row]:
    """Operations of a step at real shapes, beside those that other ways add; one size with --quick."""
    unet, rows = full_size_unet(), []
    for pixels in COUNTED[:1] if options.quick else COUNTED:
        say(f"  counting at {pixels} x {pixels}")
        added = counts.added(unet, pixels)
        step = added.bare.flops
        rows.append(Row(f"SDXL step at {pixels} x {pixels}, CFG, counted", step / BILLION, "10^9 operations"))
        for what, operations, wanted in (
            ("references add", added.term, MAX_ADDED),
            ("they would the authors' way (K, V and LoRA in every layer and step)", added.authors, None),
            ("they would IPAdapter_plus' way (K and V in every layer and step)", added.ip_adapter_plus, None),
        ):
            name = f"{what}, SDXL step at {pixels} x {pixels}, CFG, counted; to the step's own"
            rows.append(Row(name, operations / BILLION, "10^9 operations", operations / step, wanted=wanted))
        name = f"most activations at one time, same step in {counts.DTYPE}; to unpatched"
        rows.append(
            Row(name, added.patched.peak_bytes / GIB, "GiB", added.patched.peak_bytes / added.bare.peak_bytes)
        )
    if not options.quick:
        idle, bare = (counts.counted(unet, COUNTED[0], weight).flops for weight in (0.0, None))
        name = "references add outside their window, counted"
        rows.append(Row(name, idle - bare, "operations", wanted=NOTHING))
        copied = counts.copied_bytes(counts.DTYPE.itemsize, images=1)
        rows.append(Row("IPAdapter_plus copies K and V over the batch, a step", copied / GIB, "GiB"))
    return rows


class TimedProcessor(ReferenceProcessor):
    """A processor that adds up the time of its terms; on a CPU, where a call has ended when it returns."""

    seconds = 0.0

    def add_term(self, text: Tensor, q: Tensor, heads: int) -> Tensor:
        start = time.perf_counter()
        out = super().add_term(text, q, heads)
        TimedProcessor.seconds += time.perf_counter() - start
        return out


class Ways(NamedTuple):
    """One UNet with and without references; changing over takes microseconds."""

    unet: UNet2DConditionModel
    attentions: list[Any]
    bare: list[Any]
    patched: list[ReferenceProcessor]

    def step(self, processors: Sequence[Any], tensors: counts.Inputs) -> Tensor:
        for attention, processor in zip(self.attentions, processors, strict=True):
            attention.processor = processor
        return counts.step(self.unet, tensors)


def both_ways(
    unet: UNet2DConditionModel, dtype: torch.dtype, device: str, processor: type[ReferenceProcessor]
) -> Ways:
    """The UNet's own processors, and those with random K and V."""
    modules, widths = dict(unet.named_modules()), cross_attention_widths(unet)
    attentions = [modules[f"{site.diffusers}.attn2"] for site in widths]
    bare = [attention.processor for attention in attentions]
    patched = []
    for width in widths.values():
        patched.append(processor())
        patched[-1].attend_to(tuple(torch.randn(2, TOKENS, width, device=device).to(dtype) for _ in "kv"))
    return Ways(unet, attentions, bare, patched)


def random_ways(
    options: Options, say: Say, processor: type[ReferenceProcessor] = ReferenceProcessor
) -> Ways | None:
    """SDXL's UNet with random weights, small with --quick; None where the weights do not fit."""
    from diffusers import UNet2DConditionModel

    on_gpu = options.device != "cpu"
    dtype = torch.float16 if on_gpu else torch.float32
    gc.collect()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE.unet | (SMALL if options.quick else {}))
    size = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    if not on_gpu and size * 1.2 > (free := psutil.virtual_memory().available):
        say(f"  times left out: the UNet takes {size / GIB:.1f} GiB and {free / GIB:.1f} are free.")
        return None
    say(f"  making random weights, {size / GIB:.1f} GiB")
    return both_ways(materialize(unet, options.device, dtype), dtype, options.device, processor)


def timed(options: Options, say: Say) -> list[Row]:
    """Seconds of a step and memory, patched against unpatched; nothing where the weights do not fit."""
    on_gpu = options.device != "cpu"
    ways = random_ways(options, say, ReferenceProcessor if on_gpu else TimedProcessor)
    if ways is None:
        return []
    dtype = ways.unet.dtype
    rows: list[Row] = []
    for pixels in (ON_GPU,) if on_gpu and not options.quick else options.pixels:
        tensors = counts.inputs(pixels, dtype, options.device)
        name = f"{options.unet_name} step at {pixels} x {pixels}, CFG, {dtype}"
        rows += _timed_at(ways, tensors, name, options, say)
    return rows


def _timed_at(ways: Ways, tensors: counts.Inputs, name: str, options: Options, say: Say) -> list[Row]:
    say(f"  {name}: unpatched, patched")
    bare, patched = (partial(ways.step, way, tensors) for way in (ways.bare, ways.patched))
    pairs = interleaved(bare, patched, options.pairs, say)
    same = interleaved(bare, bare, options.pairs, say)
    rows = [
        pairs.row(f"{name}; patched to unpatched", None if options.quick else MAX_SLOWER),
        same.row(f"{name}; unpatched to itself: what the clock can tell"),
    ]
    if options.device == "cpu":
        steps, terms = [], []
        for _ in range(options.pairs):
            TimedProcessor.seconds = 0.0
            steps.append(seconds(patched))
            terms.append(TimedProcessor.seconds)
        rows.append(terms_row(name, steps, terms, None if options.quick else MAX_IN_TERMS))
    else:
        rows += roofline_rows(ways.unet, name, patched, pairs.medians[1])
    return rows + memory_rows(bare, patched, name, options.device)


def memory_rows(bare: Callable[[], Any], patched: Callable[[], Any], name: str, device: str) -> list[Row]:
    """Most memory of a patched step beside the weights, to the unpatched one's; none if unknown."""
    peaks = []
    for way in (bare, patched):
        with PeakMemory(device) as peak:
            way()
        peaks.append(peak.added)
    if not all(peaks):  # unknown, or too small to be measured
        return []
    label = f"{name}: most memory beside the weights; to unpatched"
    return [Row(label, peaks[1] / GIB, "GiB", peaks[1] / peaks[0])]


def terms_row(name: str, steps: Sequence[float], terms: Sequence[float], wanted: Limit | None) -> Row:
    """Seconds in the reference terms of each step, and their ratio to the rest of that step."""
    rest = tuple(step - term for step, term in zip(steps, terms, strict=True))
    label = f"{name}: time in all reference terms; to the rest of their step"
    return Pairs(rest, tuple(terms)).row(label, wanted)


def roofline_rows(unet: UNet2DConditionModel, name: str, step: Callable[[], Any], took: float) -> list[Row]:
    """Least time of a step on the device: its operations at the speed of a large matrix product."""
    with FlopCounterMode(display=False) as operations:
        step()
    weights = list(unet.parameters())
    peak = device_peak(weights[0].dtype, weights[0].device)
    floor = peak.seconds(operations.get_total_flops(), sum(weight.nbytes for weight in weights))
    label = f"{name}: at the device's peak; the step's time to it"
    return [Row(label, floor, "s", took / floor), *peak.rows()]
