"""What reading a group takes: cold, beside transformers' Qwen2-VL, and after a change of what was read before.

Groups of references of three shapes at 336 pixels, 140 to 144 image tokens each, 60 tokens of text around them. Encoding is
everything from the resized pictures to the reference tokens; beside transformers it is the MLLM body alone, from patches
and ids to context states, with the same weights, the same 27 decoder layers and no logits (the authors' code computes
those too, and the 28th layer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from easyref_core.checkpoint.modules import CheckpointModules
from easyref_core.mllm.budget import activation_bytes
from easyref_core.mllm.config import EasyRefConfig
from easyref_core.mllm.context import Provenance
from easyref_core.mllm.prefill import CachedGroupEncoder
from easyref_core.mllm.prefix_cache import PreparedGroup, PreparedImage
from easyref_core.mllm.preprocess import SIZE, grid_of, patches_of, resized_sides
from easyref_core.mllm.qwen2_vl import SkipInit
from easyref_core.training.full_size import EASYREF
from tools.bench.random_weights import materialised
from tools.bench.rows import Limit, Options, Row
from tools.bench.timing import Pairs, interleaved, peak_memory, seconds
from tools.bench.transformers_mllm import body_of

if TYPE_CHECKING:
    from torch import Tensor

GIB = 2**30
PICTURES = ((1024, 1024), (832, 1216), (1216, 832))  # width, height, one after the other
IMAGE_TOKEN = 151655  # of Qwen2-VL's tokenizer: <|image_pad|>
# text tokens: the template, what is asked, what is wanted, the template's end
BEFORE, INSTRUCTION, PROMPT, AFTER = 14, 25, 16, 5
WARM = 8  # references of the group that is changed
SHORT = 2  # references up to which all pairs are run; beyond, half of them
WHOLE = 8  # references up to which all layers are run; beyond, one in eight
QUICK = dataclasses.replace(
    EASYREF,
    vocab_size=200,
    hidden_size=96,
    intermediate_size=160,
    body_layers=2,
    heads=6,
    kv_heads=2,
    vision_depth=2,
    vision_width=48,
    vision_mlp_width=192,
    vision_heads=3,
    projector_width=96,
    token_width=64,
)


class Encoder:
    """The MLLM with random weights, and what makes groups for it."""

    def __init__(self, config: EasyRefConfig, device: str) -> None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.exact = Limit("<=", 1e-5) if dtype == torch.float32 else None
        self.image_token = min(IMAGE_TOKEN, config.vocab_size - 1)
        modules = CheckpointModules(config, {}, SkipInit, device="meta")
        self.mllm: CheckpointModules = materialised(modules, device, dtype)
        self.group_encoder = CachedGroupEncoder(self.mllm.encoder, self.image_token, self.device, dtype)

    def group(self, pictures: list[int], prompt: int = 0) -> PreparedGroup:
        """The pictures of these numbers, with the prompt of this number."""
        images = tuple(PreparedImage.of(picture(number, self.config)) for number in pictures)
        grid = grid_of([image.pixels.shape[:2] for image in images], self.config)
        ids, spans = words(BEFORE, 0), []
        for count in (grid.prod(dim=1) // self.config.merge_size**2).tolist():
            spans.append((len(ids) + 1, len(ids) + 1 + count))
            ids += [2, *[self.image_token] * count, 3]
        ids += words(INSTRUCTION, 1) + words(PROMPT, 2 + prompt) + words(AFTER, 0)
        made = Provenance("", "", "", len(pictures), SIZE)
        return PreparedGroup(images, grid, torch.tensor([ids]), made, tuple(spans))

    def states(self, group: PreparedGroup) -> Tensor:
        return self.group_encoder.run(self.group_encoder.caches.plan(group))

    def tokens(self, group: PreparedGroup) -> Tensor:
        return self.mllm.aggregator(self.states(group))

    def read_into(self, found: list[Tensor], group: PreparedGroup) -> None:
        found.append(self.tokens(group))

    def cold(self, group: PreparedGroup) -> Tensor:
        self.group_encoder.caches.clear()
        return self.tokens(group)


def words(count: int, seed: int) -> list[int]:
    """Ids of so many tokens of text, the same for the same seed."""
    return torch.randint(4, 150, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def picture(number: int, config: EasyRefConfig) -> np.ndarray:
    """A picture of noise as the MLLM reads it, (H, W, 3)."""
    width, height = PICTURES[number % len(PICTURES)]
    sides = resized_sides(height, width, config, SIZE)[-1]
    return np.random.default_rng(number).integers(0, 256, (*sides, 3), dtype=np.uint8)


def measure(options: Options, say: Callable[[str], None]) -> list[Row]:
    """Rows of the part "encode"; see the package."""
    whole = QUICK if options.quick else EASYREF
    encoder = Encoder(whole, options.device)
    warm = 2 if options.quick else WARM
    rows = _changed(encoder, warm, options, say)
    small = [count for count in options.references if count <= WHOLE]
    rows += [row for count in small for row in _cold(encoder, count, options, say)]
    large = [count for count in options.references if count > WHOLE]
    if large:
        del encoder
        part = dataclasses.replace(
            whole, vision_depth=max(1, whole.vision_depth // 8), body_layers=max(1, whole.body_layers // 8)
        )
        encoder = Encoder(part, options.device)
        rows += [row for count in large for row in _cold(encoder, count, options, say)]
    return rows


def _changed(encoder: Encoder, count: int, options: Options, say: Callable[[str], None]) -> list[Row]:
    """After a group of `count` was read: what it takes to read it changed, beside reading it cold."""
    first = list(range(count))
    group = encoder.group(first)
    prompts = iter(range(1, 10**6))
    changes: dict[str, tuple[Callable[[], PreparedGroup], Limit | None]] = {
        "prompt changed": (lambda: encoder.group(first, next(prompts)), Limit("<=", 1 / 30)),
        "one added at the end": (lambda: encoder.group([*first, count]), Limit("<=", 1 / 6)),
        "the last removed": (lambda: encoder.group(first[:-1]), None),
        "the first removed": (lambda: encoder.group(first[1:]), None),
        "order reversed": (lambda: encoder.group(first[::-1]), None),
        "one replaced in the middle": (
            lambda: encoder.group([*first[: count // 2], count, *first[count // 2 + 1 :]]),
            None,
        ),
    }
    rows = []
    for name, (make, wanted) in changes.items():
        say(f" {count} references, {name}")
        found, took, cold = [], [], []
        for _ in range(max(1, options.pairs // 2) if wanted else 1):
            cold.append(seconds(lambda: encoder.cold(group), options.device))
            changed = make()
            took.append(seconds(partial(encoder.read_into, found, changed), options.device))
            say(f"  cold {cold[-1]:.3f} s, {name} {took[-1]:.3f} s")
        apart = encoder.cold(changed)
        distance = float((found[-1] - apart).norm() / apart.norm())
        pairs = Pairs(tuple(cold), tuple(took))
        what = f"{count} references, {name}"
        rows += [
            pairs.row(f"{what}: encoding / the group before, cold", wanted),
            Row(
                f"{what}: distance of the tokens from a cold run's", distance, "of them", wanted=encoder.exact
            ),
        ]
    return rows


def _cold(encoder: Encoder, count: int, options: Options, say: Callable[[str], None]) -> list[Row]:
    """A group read for the first time: time and memory, beside transformers' Qwen2-VL."""
    config, group = encoder.config, encoder.group(list(range(count)))
    depth = "" if config.body_layers in (EASYREF.body_layers, QUICK.body_layers) else ", one layer in eight"
    name = f"{count} references ({group.input_ids.shape[1]} tokens{depth})"
    say(f" {name}")

    def ours() -> Tensor:
        encoder.group_encoder.caches.clear()
        return encoder.states(group)

    encoder.group_encoder.caches.clear()  # before it is measured what is there
    with peak_memory(options.device) as peak:
        states = encoder.states(group)
    bound = activation_bytes(config, group.patches, group.input_ids.shape[1], encoder.dtype.itemsize)
    rows = []
    theirs = body_of(encoder.mllm.encoder, encoder.image_token, encoder.device)
    if theirs is None:
        say("  transformers is not installed: not compared")
        took = seconds(ours, options.device)
        rows.append(Row(f"{name}, cold", took, "s"))
    else:
        patches = patches_of([image.pixels for image in group.images], config).to(
            encoder.device, encoder.dtype
        )
        ids = group.input_ids.to(encoder.device)
        apart = theirs(patches, group.grid, ids)
        distance = float((states - apart).float().norm() / apart.float().norm())
        del apart
        wanted = options.pairs if count <= SHORT else max(1, options.pairs // 2)
        pairs = interleaved(lambda: theirs(patches, group.grid, ids), ours, wanted, say, options.device)
        rows += [
            pairs.row(f"{name}, cold / transformers", Limit("<=", 1.0)),
            Row(f"{name}, distance of the states from its", distance, "of them", wanted=encoder.exact),
        ]
    if peak.added is not None:
        rows.append(
            Row(
                f"{name}, memory beside the weights / the bound told before",
                peak.added / GIB,
                "GiB",
                peak.added / bound,
                wanted=Limit("<=", 1.0),
            )
        )
    encoder.group_encoder.caches.clear()
    return rows
