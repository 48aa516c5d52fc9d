"""Cost of encoding a group: cold, beside transformers' Qwen2-VL, and after a change of the group before.

Groups of references of three shapes at 336 pixels, 140 to 144 image tokens each, 60 tokens of text around
them. Encoding is everything from the resized images to the reference tokens; beside transformers it is the
MLLM body alone, from patches and ids to context states, with the same weights, the same 27 decoder layers and
no logits (the authors' code computes those too, and the 28th layer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
from tools.bench.random_weights import QUICK, materialize
from tools.bench.report import GIB, Limit, Options, Row
from tools.bench.timing import Pairs, PeakMemory, Say, interleaved, seconds
from tools.bench.transformers_mllm import body_of

if TYPE_CHECKING:
    from torch import Tensor

    from easyref_core.model import EasyRef

IMAGE_SIZES = ((1024, 1024), (832, 1216), (1216, 832))  # width, height, in turn
IMAGE_TOKEN = 151655  # of Qwen2-VL's tokenizer: <|image_pad|>
# text tokens: the template's start, instruction, prompt, the template's end
BEFORE, INSTRUCTION, PROMPT, AFTER = 14, 25, 16, 5
CHANGED_REFERENCES = 8  # of the group that is changed
PROMPT_CHANGED, ONE_ADDED = "prompt changed", "one added at the end"
CHANGES = (
    *(PROMPT_CHANGED, ONE_ADDED),
    *("the last removed", "the first removed", "order reversed", "one replaced in the middle"),
)
MAX_ALL_PAIRS = 2  # references up to which all pairs are run; beyond, half of them
MAX_ALL_LAYERS = 8  # references up to which all layers are run; beyond, one in eight


class Encoder:
    """The MLLM, and groups for it. note: ends the name of each group, where the MLLM is not whole."""

    def __init__(self, mllm: CheckpointModules, encoder: CachedGroupEncoder, note: str = "") -> None:
        self.mllm, self.encoder, self.note = mllm, encoder, note
        self.config, self.image_token = mllm.encoder.config, encoder.image_token
        self.device, self.dtype = encoder.device, encoder.dtype
        self.exact = Limit("<=", 1e-5) if self.dtype == torch.float32 else None

    @classmethod
    def random(cls, config: EasyRefConfig, device: str, note: str = "") -> Encoder:
        """With random weights of these sizes; bfloat16 on a GPU, else float32."""
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        modules = CheckpointModules(config, {}, SkipInit, device="meta")
        mllm: CheckpointModules = materialize(modules, device, dtype)
        image_token = min(IMAGE_TOKEN, config.vocab_size - 1)
        return cls(mllm, CachedGroupEncoder(mllm.encoder, image_token, torch.device(device), dtype), note)

    @classmethod
    def of(cls, easyref: EasyRef) -> Encoder:
        """With the weights and caches of a loaded model."""
        return cls(easyref.modules, easyref.group_encoder)

    def group(self, images: list[int], prompt: int = 0) -> PreparedGroup:
        """The images of these numbers, with the prompt of this number."""
        prepared = tuple(PreparedImage.of(noise_image(number, self.config)) for number in images)
        grid = grid_of([image.pixels.shape[:2] for image in prepared], self.config)
        ids, spans = text_ids(BEFORE, 0), []
        for count in (grid.prod(dim=1) // self.config.merge_size**2).tolist():
            spans.append((len(ids) + 1, len(ids) + 1 + count))
            ids += [2, *[self.image_token] * count, 3]
        ids += text_ids(INSTRUCTION, 1) + text_ids(PROMPT, 2 + prompt) + text_ids(AFTER, 0)
        provenance = Provenance("", "", "", len(images), SIZE)
        return PreparedGroup(prepared, grid, torch.tensor([ids]), provenance, tuple(spans))

    def states(self, group: PreparedGroup) -> Tensor:
        return self.encoder.run(self.encoder.caches.plan(group))

    def tokens(self, group: PreparedGroup) -> Tensor:
        return self.mllm.aggregator(self.states(group))

    def add_tokens(self, group: PreparedGroup, to: list[Tensor]) -> None:
        to.append(self.tokens(group))

    def cold_states(self, group: PreparedGroup) -> Tensor:
        self.encoder.caches.clear()
        return self.states(group)

    def cold_tokens(self, group: PreparedGroup) -> Tensor:
        return self.mllm.aggregator(self.cold_states(group))


def text_ids(count: int, seed: int) -> list[int]:
    """Ids of `count` tokens of text, the same for the same seed."""
    return torch.randint(4, 150, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def noise_image(number: int, config: EasyRefConfig) -> np.ndarray:
    """An image of noise as the MLLM takes it, (H, W, 3)."""
    width, height = IMAGE_SIZES[number % len(IMAGE_SIZES)]
    sides = resized_sides(height, width, config, SIZE)[-1]
    return np.random.default_rng(number).integers(0, 256, (*sides, 3), dtype=np.uint8)


def measure(options: Options, say: Say) -> list[Row]:
    """Rows of the part "encode"; see the package."""
    config = QUICK if options.quick else EASYREF
    encoder = Encoder.random(config, options.device)
    rows = changed(encoder, 2 if options.quick else CHANGED_REFERENCES, options, say)
    small = [count for count in options.references if count <= MAX_ALL_LAYERS]
    rows += [row for count in small for row in cold(encoder, count, options, say)]
    if large := [count for count in options.references if count > MAX_ALL_LAYERS]:
        del encoder
        depths = {name: max(1, getattr(config, name) // 8) for name in ("vision_depth", "body_layers")}
        shallow = dataclasses.replace(config, **depths)
        encoder = Encoder.random(shallow, options.device, ", one layer in eight")
        rows += [row for count in large for row in cold(encoder, count, options, say)]
    return rows


def changed(
    encoder: Encoder, count: int, options: Options, say: Say, names: Sequence[str] = CHANGES
) -> list[Row]:
    """Time of encoding a changed group right after the group was encoded cold; to the cold time.

    names: of the changes, some of CHANGES.
    """
    first, middle, prompts = list(range(count)), count // 2, iter(range(1, 10**6))
    changes: dict[str, tuple[Callable[[], PreparedGroup], Limit | None]] = {
        PROMPT_CHANGED: (lambda: encoder.group(first, next(prompts)), Limit("<=", 1 / 30)),
        ONE_ADDED: (lambda: encoder.group([*first, count]), Limit("<=", 1 / 6)),
        "the last removed": (lambda: encoder.group(first[:-1]), None),
        "the first removed": (lambda: encoder.group(first[1:]), None),
        "order reversed": (lambda: encoder.group(first[::-1]), None),
        "one replaced in the middle": (
            lambda: encoder.group([*first[:middle], count, *first[middle + 1 :]]),
            None,
        ),
    }
    group, rows = encoder.group(first), []
    for name in names:
        change, wanted = changes[name]
        say(f" {count} references, {name}")
        tokens, warm, cold = [], [], []
        for _ in range(max(1, options.pairs // 2) if wanted else 1):
            cold.append(seconds(lambda: encoder.cold_tokens(group)))
            after = change()
            warm.append(seconds(partial(encoder.add_tokens, after, tokens)))
            say(f"  cold {cold[-1]:.3f} s, {name} {warm[-1]:.3f} s")
        distance = _distance(tokens[-1], encoder.cold_tokens(after))
        what = f"{count} references, {name}"
        pairs = Pairs(tuple(cold), tuple(warm))
        label = f"{what}: distance of the tokens from a cold run's"
        rows += [
            pairs.row(f"{what}: encoding / the group before, cold", wanted),
            Row(label, distance, "of them", wanted=encoder.exact),
        ]
    return rows


def cold(encoder: Encoder, count: int, options: Options, say: Say) -> list[Row]:
    """Time and memory of a group that is encoded for the first time, beside transformers' Qwen2-VL."""
    config, group = encoder.config, encoder.group(list(range(count)))
    name = f"{count} references ({group.input_ids.shape[1]} tokens{encoder.note})"
    say(f" {name}")
    encoder.encoder.caches.clear()  # so that the memory before does not hold an earlier group
    with PeakMemory(options.device) as peak:
        states = encoder.states(group)
    theirs = body_of(encoder.mllm.encoder, encoder.image_token, encoder.device)
    if theirs is None:
        say("  transformers is not installed: not compared")
        rows = [Row(f"{name}, cold", seconds(lambda: encoder.cold_states(group)), "s")]
    else:
        patches = patches_of([image.pixels for image in group.images], config).to(
            encoder.device, encoder.dtype
        )
        ids = group.input_ids.to(encoder.device)
        distance = _distance(states, theirs(patches, group.grid, ids))
        count = options.pairs if count <= MAX_ALL_PAIRS else max(1, options.pairs // 2)
        pairs = interleaved(
            lambda: theirs(patches, group.grid, ids), lambda: encoder.cold_states(group), count, say
        )
        label = f"{name}, distance of the states from its"
        rows = [
            pairs.row(f"{name}, cold / transformers", Limit("<=", 1.0)),
            Row(label, distance, "of them", wanted=encoder.exact),
        ]
    if peak.added is not None:
        bound = activation_bytes(config, group.patches, group.input_ids.shape[1], encoder.dtype.itemsize)
        label = f"{name}, memory beside the weights / the bound told before"
        rows.append(Row(label, peak.added / GIB, "GiB", peak.added / bound, wanted=Limit("<=", 1.0)))
    encoder.encoder.caches.clear()
    return rows


def _distance(tensor: Tensor, baseline: Tensor) -> float:
    """Relative distance, ||tensor - baseline|| / ||baseline||."""
    return float((tensor - baseline).float().norm() / baseline.float().norm())
