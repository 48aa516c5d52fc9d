"""Storage in fp8: bytes held at full size, and the tokens of weights that are rounded to it.

The nodes cast each weight to bfloat16 when it is used (host_modes.py measures that). Weights that were
rounded to fp8 before give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import easyref_core as er
from devkit import golden
from easyref_core.checkpoint.checkpoint import may_be_fp8, open_checkpoint
from easyref_core.model import build
from easyref_core.training.full_size import EASYREF
from tools.bench.gpu_parts.golden import cosine
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.loading import held_rows
from tools.bench.report import Row
from tools.bench.timing import Say


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Counted bytes, then the cosine of the golden tokens to those of weights that are not rounded."""
    yield from held_rows(EASYREF)
    say("  golden tokens with weights rounded to fp8")
    rounded, stored = (golden_tokens(options, fp8) for fp8 in (True, False))
    yield Row("golden tokens with weights in fp8; to those as stored", cosine(rounded, stored), "cosine")


def golden_tokens(options: GpuOptions, fp8: bool) -> er.ReferenceTokens:
    """Tokens of the golden group, computed in the device's dtype."""

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if fp8 and may_be_fp8(name, tensor):
            tensor = tensor.to(torch.float8_e4m3fn)
        return tensor.to(options.device, options.dtype)

    opened = open_checkpoint(golden.CHECKPOINT, golden.MLLM)
    model = build(opened, golden.MLLM, options.device, options.dtype, cast)
    return model.aggregate(model.encode(golden.references(), golden.PROMPT, size=golden.SIZE))
