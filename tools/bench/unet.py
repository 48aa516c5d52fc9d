"""What the reference term adds to a step of SDXL's UNet: operations, time and memory.

Counted at full size without weights (unet_counts.py). Timed on diffusers' UNet with random weights: whole steps in pairs, and,
as a step's own time varies by more than the term takes, the time inside the 70 terms as part of their own step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from easyref_core.unet.diffusers_unet import ReferenceProcessor, attach, cross_attention_widths
from tools.bench.machine import free_bytes
from tools.bench.random_weights import materialised
from tools.bench.rows import Limit, Options, Row
from tools.bench.timing import Pairs, interleaved, peak_memory, seconds

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

Say = Callable[[str], None]

ADDED, SLOWER = Limit("<=", 0.006), Limit("<=", 1.03)
IN_TERMS = Limit("<=", 0.03)
NOTHING = Limit("<=", 0)
COUNTED = (256, 512, 1024)  # pixels
ON_GPU = 1024  # pixels
SMALL: dict[str, Any] = {  # in place of SDXL's sizes, for --quick
    "block_out_channels": (32, 64, 128),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 2),
}
TOKENS = 64
GIB, BILLION = 2**30, 1e9


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
    """Operations of a step at real shapes, beside what other ways would add to it; of --quick one size."""
    from easyref_core.training.full_size import unet as full_size_unet
    from tools.bench import unet_counts as counts

    unet, rows = full_size_unet(), []
    for pixels in COUNTED[:1] if options.quick else COUNTED:
        say(f"  counting at {pixels} x {pixels}")
        found = counts.added(unet, pixels)
        step = found.bare.flops

        def row(what: str, added: int, wanted: Limit | None = None, pixels=pixels, step=step) -> Row:
            name = f"{what}, SDXL step at {pixels} x {pixels}, CFG, counted; to the step's own"
            return Row(name, added / BILLION, "10^9 operations", added / step, wanted=wanted)

        rows += [
            Row(f"SDXL step at {pixels} x {pixels}, CFG, counted", step / BILLION, "10^9 operations"),
            row("references add", found.term, ADDED),
            row("they would the authors' way (K, V and LoRA in every layer and step)", found.authors),
            row("they would IPAdapter_plus' way (K and V in every layer and step)", found.ip_adapter_plus),
            Row(
                f"most activations at one time, same step in {counts.DTYPE}; to unpatched",
                found.patched.peak_bytes / GIB,
                "GiB",
                found.patched.peak_bytes / found.bare.peak_bytes,
            ),
        ]
    if not options.quick:
        idle = counts.counted(unet, COUNTED[0], 0.0).flops
        bare = counts.counted(unet, COUNTED[0], None).flops
        rows.append(
            Row("references add outside their window, counted", idle - bare, "operations", wanted=NOTHING)
        )
        copied = counts.copied_bytes(counts.DTYPE.itemsize, images=1)
        rows.append(Row("IPAdapter_plus copies K and V over the batch, a step", copied / GIB, "GiB"))
    return rows


class Timed(ReferenceProcessor):
    """A processor that adds up the time of its terms; on a CPU, where a call has ended when it returns."""

    spent = 0.0

    def with_references(self, text: Tensor, q: Tensor, heads: int) -> Tensor:
        start = time.perf_counter()
        out = super().with_references(text, q, heads)
        Timed.spent += time.perf_counter() - start
        return out


class Ways(NamedTuple):
    """One UNet with and without references; changing over takes microseconds."""

    unet: UNet2DConditionModel
    attentions: list[Any]
    bare: list[Any]
    patched: list[ReferenceProcessor]

    def step(self, processors: Sequence[Any], given: Any) -> Tensor:
        from tools.bench.unet_counts import step

        for attention, processor in zip(self.attentions, processors, strict=True):
            attention.processor = processor
        return step(self.unet, given)


def both_ways(unet: UNet2DConditionModel, dtype: torch.dtype, device: str) -> Ways:
    """The UNet's own processors, and those with random K and V."""
    modules = dict(unet.named_modules())
    attentions = [modules[f"{site.diffusers}.attn2"] for site in cross_attention_widths(unet)]
    bare = [attention.processor for attention in attentions]
    attached = attach(unet)
    attached.condition(
        [
            tuple(torch.randn(2, TOKENS, width, device=device).to(dtype) for _ in "kv")
            for width in cross_attention_widths(unet).values()
        ]
    )
    patched = []
    for attention in attentions:
        patched.append(Timed() if device == "cpu" else ReferenceProcessor())
        patched[-1].key_value = attention.processor.key_value
    attached.remove()
    return Ways(unet, attentions, bare, patched)


def timed(options: Options, say: Say) -> list[Row]:
    """Seconds of a step and memory, patched against unpatched; nothing where the weights have no room."""
    from easyref_core.training.full_size import UNET

    on_gpu = options.device != "cpu"
    dtype = torch.float16 if on_gpu else torch.float32
    config = UNET | SMALL if options.quick else UNET
    unet = _on_meta(config)
    size = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    if not on_gpu and size * 1.2 > (free := free_bytes() or size * 2):
        say(f"  times left out: the UNet takes {size / GIB:.1f} GiB and {free / GIB:.1f} are free.")
        return []
    say(f"  making random weights, {size / GIB:.1f} GiB")
    ways = both_ways(materialised(unet, options.device, dtype), dtype, options.device)
    kind = "small UNet" if options.quick else "SDXL"
    rows = []
    for pixels in (ON_GPU,) if on_gpu and not options.quick else options.pixels:
        rows += _timed_at(
            ways, pixels, f"{kind} step at {pixels} x {pixels}, CFG, {dtype}", dtype, options, say
        )
    return rows


def _timed_at(
    ways: Ways, pixels: int, name: str, dtype: torch.dtype, options: Options, say: Say
) -> list[Row]:
    from tools.bench.unet_counts import inputs

    given, device = inputs(pixels, dtype, options.device), options.device
    say(f"  {name}: unpatched, patched")
    bare, patched = (partial(ways.step, way, given) for way in (ways.bare, ways.patched))
    pairs = interleaved(bare, patched, options.pairs, say, device)
    rows = [pairs.row(f"{name}; patched to unpatched", None if options.quick else SLOWER)]
    same = interleaved(bare, bare, options.pairs, say, device)
    rows.append(same.row(f"{name}; unpatched to itself: what the clock can tell"))
    if device == "cpu":
        rows.append(_terms_row(name, patched, options))
    else:
        rows += _roofline_rows(ways, name, patched, pairs, dtype, device)
    return rows + _memory_rows(name, bare, patched, device)


def _memory_rows(name: str, bare: Callable[[], Any], patched: Callable[[], Any], device: str) -> list[Row]:
    """The most memory of a step beside the weights: with references, to that without."""
    found = []
    for way in (bare, patched):
        with peak_memory(device) as peak:
            way()
        found.append(peak.added)
    if not all(found):  # not known, or too small to be seen
        return []
    label = f"{name}: most memory beside the weights; to unpatched"
    return [Row(label, found[1] / GIB, "GiB", found[1] / found[0])]


def terms_row(name: str, whole: Sequence[float], terms: Sequence[float], wanted: Limit | None) -> Row:
    """Seconds in the reference terms of a step, and their ratio to the rest of the step: one figure of each per step."""
    rest = tuple(step - term for step, term in zip(whole, terms, strict=True))
    label = f"{name}: time in all reference terms; to the rest of their step"
    return Pairs(rest, tuple(terms)).row(label, wanted)


def _terms_row(name: str, patched: Callable[[], Any], options: Options) -> Row:
    whole, terms = [], []
    for _ in range(options.pairs):
        Timed.spent = 0.0
        whole.append(seconds(patched))
        terms.append(Timed.spent)
    return terms_row(name, whole, terms, None if options.quick else IN_TERMS)


def _roofline_rows(
    ways: Ways,
    name: str,
    patched: Callable[[], Any],
    pairs: Pairs,
    dtype: torch.dtype,
    device: str,
) -> list[Row]:
    """What the device could do at best: the step's operations at the speed of a large matrix product."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as operations:
        patched()
    weights = sum(parameter.nbytes for parameter in ways.unet.parameters())
    speed, copying = peaks(dtype, device)
    floor = max(operations.get_total_flops() / speed, weights / copying)
    return [
        Row(f"{name}: at the device's peak; the step's time to it", floor, "s", pairs.medians[1] / floor),
        Row(f"{name}: peak of a large matrix product, {dtype}", speed / 1e12, "10^12 operations/s"),
        Row(f"{name}: peak of a large copy, read and written", copying / 1e9, "10^9 bytes/s"),
    ]


def peaks(dtype: torch.dtype, device: str, side: int = 8192) -> tuple[float, float]:
    """Operations a second of a matrix product, side x side, and bytes a second of a copy of as many values."""
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in "abc")
    product, copy = (
        [seconds(call, device) for _ in range(5)]
        for call in (lambda: torch.mm(a, b, out=c), lambda: c.copy_(a))
    )
    return 2 * side**3 / min(product), 2 * a.nbytes / min(copy)


def _on_meta(config: dict[str, Any]) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    gc.collect()
    with torch.device("meta"):
        return UNet2DConditionModel(**config)
