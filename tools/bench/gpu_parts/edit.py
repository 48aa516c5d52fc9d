"""Encoding a group again after a change, from the images to the reference tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch

import easyref_core as er
from tools.bench.encoding import CHANGED_REFERENCES, ONE_ADDED, PROMPT_CHANGED, Encoder, changed
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Limit, Row
from tools.bench.timing import Say, seconds

MAX_PROMPT_EDIT = Limit("<=", 0.060)  # seconds
SIDE, QUICK_SIDE = 1024, 64  # of the references, in pixels
QUICK_REFERENCES = 2


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Seconds of the whole encoding after a change, then the MLLM's alone against the group before, cold."""
    easyref = options.load_easyref()
    yield from whole(easyref, options, say)
    easyref.clear_cache()
    count = QUICK_REFERENCES if options.quick else CHANGED_REFERENCES
    yield from changed(Encoder.of(easyref), count, options, say, (PROMPT_CHANGED, ONE_ADDED))


def whole(easyref: er.EasyRef, options: GpuOptions, say: Say) -> Iterator[Row]:
    """Hashing, preprocessing, the MLLM and the aggregation together, as the nodes run them."""
    side, count = (QUICK_SIDE, QUICK_REFERENCES) if options.quick else (SIDE, CHANGED_REFERENCES)
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(side, side, 3, generator=random) for _ in range(count + 1)]
    say(f"  {count} references of {side} x {side}, from images to tokens")
    tokens(easyref, images[:2], "warm up")
    easyref.clear_cache()
    name, group = f"{count} references of {side} x {side}, from images to tokens", images[:count]
    yield Row(f"{name}: cold", seconds(partial(tokens, easyref, group, "prompt")), "s")
    runs = 2 * options.pairs
    edits = [seconds(partial(tokens, easyref, group, f"prompt {number}")) for number in range(runs)]
    wanted = None if options.quick else MAX_PROMPT_EDIT
    yield Row(f"{name}: prompt edit", statistics.median(edits), "s", wanted=wanted)
    planning = partial(easyref.prepare, group, "prompt", er.INSTRUCTION, er.SIZE)
    times = [seconds(lambda: easyref.plan(planning())) for _ in range(runs)]
    yield Row(f"{name}: of a prompt edit, hashing and planning on the CPU", statistics.median(times), "s")
    yield Row(f"{name}: one added", seconds(partial(tokens, easyref, images, "prompt")), "s")


def tokens(easyref: er.EasyRef, images: Sequence[torch.Tensor], prompt: str) -> er.ReferenceTokens:
    return easyref.aggregate(easyref.encode(images, prompt))
