"""Time of each stage of encoding a group: cold, after another prompt, and in the authors' code.

From images of 1024 x 1024 to the reference tokens. The authors' stages are the libraries' that their code
calls: PIL's resize (in qwen_vl_utils' fetch_image), transformers' image processor, its vision tower and its
decoder, on the same weights. Their code repeats all of them for every prompt; it also computes the 28th layer
and the logits of every token, which are left out here. CPU time is that of all threads.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.utils.benchmark import timer  # waits for the accelerator

from easyref_core.mllm.budget import flops
from easyref_core.mllm.instructions import INSTRUCTION, tokenize
from easyref_core.mllm.prefix_cache import hash_values
from easyref_core.mllm.preprocess import SIZE, patches_of, pixel_limits, resized_sides
from easyref_core.mllm.tokenizer import load_tokenizer
from easyref_core.training.full_size import EASYREF
from easyref_core.utils.images import to_rgb
from tools.bench.encoding import CHANGED_REFERENCES, Encoder
from tools.bench.loading import TOKENIZER
from tools.bench.random_weights import QUICK
from tools.bench.report import Limit, Options, Row
from tools.bench.roofline import device_peak
from tools.bench.timing import Call, Say, cpu_seconds, seconds
from tools.bench.transformers_mllm import body_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from easyref_core.mllm.config import EasyRefConfig
    from easyref_core.mllm.prefix_cache import PreparedImage

SIDE, QUICK_SIDE = 1024, 64  # of the references, in pixels
QUICK_REFERENCES = 2
TEXT = f"{INSTRUCTION}a prompt of some words"
MAX_PROMPT_EDIT = Limit("<=", 0.010)  # seconds of CPU time before the MLLM
MAX_PREPARATION = Limit("<=", 0.150)  # seconds
MAX_DIFFERENCE = Limit("<=", 1e-5)  # of normalised values: transformers' arithmetic changed after 4.45
VISION, DECODER, AGGREGATION = "vision tower", "decoder", "aggregation"


def measure(options: Options, say: Say) -> list[Row]:
    """Rows of the part "stages"; see the package."""
    count, side = (QUICK_REFERENCES, QUICK_SIDE) if options.quick else (CHANGED_REFERENCES, SIDE)
    encoder = Encoder.random(QUICK if options.quick else EASYREF, options.device)
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(side, side, 3, generator=random) for _ in range(count)]
    name = f"{count} references of {side} x {side}"
    say(f" {name}: the MLLM")
    rows = list(mllm(encoder, count))
    say(f" {name}: before the MLLM")
    rows += before_mllm(encoder, images, options)
    return [Row(f"{name}, {row.name}", row.value, row.unit, row.ratio, wanted=row.wanted) for row in rows]


def before_mllm(encoder: Encoder, images: list[Tensor], options: Options) -> Iterator[Row]:
    """Hashing, resizing, tokenizing and planning after `mllm`; then the authors' preprocessing."""
    config, caches = encoder.config, encoder.encoder.caches

    def median(call: Call, clock: Callable[[Call], float] = seconds) -> float:
        return statistics.median(clock(call) for _ in range(options.pairs))

    def prepare() -> tuple[PreparedImage, ...]:
        return caches.prepare(images, config, SIZE)

    def prepare_cold() -> None:
        caches.images.clear()
        prepare()

    numbers = list(range(len(images)))
    edited = [encoder.group(numbers, prompt) for prompt in range(2, 2 + options.pairs)]
    pixels = [image.pixels for image in prepare()]
    counts = [image.shape[0] * image.shape[1] // config.pixels_per_token**2 for image in pixels]
    edit = {
        "hash": lambda: [hash_values(image) for image in images],
        "find the resized images": prepare,
        "tokenize": partial(tokenize, load_tokenizer(TOKENIZER), TEXT, counts),
        "plan": lambda: caches.plan(edited.pop()),
    }
    wanted = None if options.quick else MAX_PREPARATION
    yield Row("cold: hash and resize", median(prepare_cold), "s", wanted=wanted)
    yield Row("cold: hash and resize, CPU time", median(prepare_cold, cpu_seconds), "s")
    yield Row("cold: patches", median(partial(patches_of, pixels, config)), "s")
    times = {stage: median(call, cpu_seconds) for stage, call in edit.items()}
    for stage, time in times.items():
        yield Row(f"prompt edit: {stage}, CPU time", time, "s")
    total = sum(times.values()) - times["hash"]  # finding the images hashes them, too
    wanted = None if options.quick else MAX_PROMPT_EDIT
    yield Row("prompt edit: all before the MLLM, CPU time", total, "s", wanted=wanted)
    if authors := authors_preprocessing([to_rgb(image) for image in images], config):
        resize, process = authors
        yield Row("authors': first resize", median(resize), "s")
        yield Row("authors': image processor", median(process), "s")
        difference = (process() - patches_of(pixels, config)).abs().max()
        yield Row(
            "authors': largest difference of a value", float(difference), "normalised", wanted=MAX_DIFFERENCE
        )


def authors_preprocessing(
    images: list[Image.Image], config: EasyRefConfig
) -> tuple[Callable[[], list[Image.Image]], Callable[[], Tensor]] | None:
    """The first resize, then the image processor: patches (sum, 1176). None without transformers."""
    try:
        processor = pil_processor(SIZE, config.pixels_per_token)
    except ImportError:
        return None

    def resize() -> list[Image.Image]:
        sides = [resized_sides(image.height, image.width, config, SIZE)[0][::-1] for image in images]
        return [
            image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(images, sides, strict=True)
        ]

    resized = resize()
    return resize, lambda: processor(images=resized, return_tensors="pt")["pixel_values"]


def pil_processor(size: int, unit: int) -> Any:
    """Qwen2-VL's image processor on PIL and numpy, which the authors' code calls."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil as Processor,
        )
    except ImportError:  # before 5.0
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    low, high = pixel_limits(size, unit)
    return Processor(min_pixels=low, max_pixels=high)


def mllm(encoder: Encoder, count: int) -> Iterator[Row]:
    """The MLLM's stages: cold, after another prompt beside its roofline, and transformers'."""
    body, config = encoder.mllm.encoder, encoder.config
    stages = {VISION: [body.visual], DECODER: body.layers, AGGREGATION: [encoder.mllm.aggregator]}
    group, edited = (encoder.group(list(range(count)), prompt) for prompt in range(2))
    with clocked(stages) as times:
        encoder.cold_tokens(group)
    yield from (Row(f"cold: {stage}", times[stage], "s") for stage in stages)
    plan = encoder.encoder.caches.plan(edited)
    with clocked(stages) as times:
        encoder.tokens(edited)
    yield Row(f"prompt edit: {AGGREGATION}", times[AGGREGATION], "s")
    operations = flops(config, (), plan.new_tokens, plan.cached_tokens)
    moved = sum(weight.nbytes for weight in body.layers.parameters()) + plan.prefix.nbytes
    floor = device_peak(encoder.dtype, encoder.device).seconds(operations, moved)
    label = f"prompt edit: {DECODER}, {plan.new_tokens} of {plan.group.input_ids.shape[1]} tokens"
    yield Row(f"{label}; to the roofline", times[DECODER], "s", times[DECODER] / floor)
    yield Row(f"{label}, counted", operations / 1e9, "10^9 operations")
    yield Row(f"{label}, weights, keys and values", moved / 1e9, "10^9 bytes")
    if theirs := body_of(body, encoder.image_token, encoder.device):
        pixels = [image.pixels for image in group.images]
        patches = patches_of(pixels, config).to(encoder.device, encoder.dtype)
        with clocked({VISION: [theirs.tower], DECODER: [theirs.text]}) as times:
            theirs(patches, group.grid, group.input_ids.to(encoder.device))
        yield from (Row(f"transformers: {stage}", times[stage], "s") for stage in (VISION, DECODER))


@contextmanager
def clocked(stages: Mapping[str, Iterable[nn.Module]]) -> Iterator[Counter[str]]:
    """Seconds that the modules of each stage take in the block."""
    times: Counter[str] = Counter()

    def start(stage: str, *_: Any) -> None:
        times[stage] -= timer()

    def end(stage: str, *_: Any) -> None:
        times[stage] += timer()

    handles = []
    for stage, modules in stages.items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(partial(start, stage)))
            handles.append(module.register_forward_hook(partial(end, stage)))
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()
