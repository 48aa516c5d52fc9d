"""Time and memory of loading a checkpoint of the released layout, random weights, from a warm page cache.

Loading is timed in pairs with a plain read of the same file into fresh memory, which is the least that
copying it can take. A checkpoint loaded as it is stored stays mapped and copies nothing. Memory is anonymous
memory, without the pages of the mapped file, which the system can take back.
"""

from __future__ import annotations

import dataclasses
import gc
import mmap
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from easyref_core.checkpoint.checkpoint import expected_shapes, may_be_fp8, open_checkpoint, save
from easyref_core.model import EasyRef, build
from easyref_core.training.full_size import EASYREF
from tools.bench.random_weights import BLOCK, QUICK, fill, sdxl_widths
from tools.bench.report import GIB, Limit, Options, Row
from tools.bench.timing import PeakMemory, Say, interleaved

if TYPE_CHECKING:
    from torch import Tensor

    from easyref_core.mllm.config import EasyRefConfig

DtypeOf = Callable[[str, "Tensor"], torch.dtype]  # name in the model, tensor -> its dtype once loaded

TOKENIZER = Path(__file__).parents[2] / "easyref_core" / "tiny" / "weights" / "tiny-qwen2-vl"
MAX_PEAK = Limit("<=", 1.1)
HALF = Limit("<=", 0.505)  # to two digits; norms and biases take as much as before
MIN_LAYERS = 3
PARTS = {
    "encoder": "vision tower and MLLM body",
    "aggregator": "last layer, reference tokens and projector",
    "kv": "K and V projections",
}


def in_fp8(name: str, tensor: Tensor) -> torch.dtype:
    """As the nodes' fp8_e4m3fn stores them, on a device that looks up fp8."""
    return torch.float8_e4m3fn if may_be_fp8(name, tensor) else tensor.dtype


PRECISIONS: dict[str, DtypeOf] = {
    "as stored": lambda _, tensor: tensor.dtype,
    "to float32": lambda *_: torch.float32,
    "to fp8": in_fp8,
}


def measure(options: Options, say: Say) -> list[Row]:
    """Seconds and peak memory of each precision, and the memory that fp8 holds."""
    config = QUICK if options.quick else _largest_that_fits(EASYREF)
    if config is None:
        say("  left out: neither memory nor disk have room for a few of the MLLM's layers.")
        return []
    layers = "" if config.body_layers == EASYREF.body_layers else f", {config.body_layers} of 27 layers"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "easyref.safetensors"
        say(f"  writing a checkpoint with random weights{layers}")
        write(file, config)
        size = f"load {file.stat().st_size / GIB:.2f} GiB in bfloat16"
        name, rows = f"{size}{' of small shapes' if options.quick else layers}", []
        for precision, dtype_of in PRECISIONS.items():
            say(f"  {precision}: plain read, load")
            rows += _loaded(f"{name}, {precision}", file, dtype_of, options, say)
    return rows + held_rows(EASYREF)


def load(file: Path, dtype_of: DtypeOf) -> EasyRef:
    """The model with each weight in the dtype of `dtype_of`; a weight in its stored dtype stays mapped."""
    checkpoint = open_checkpoint(file)
    return build(checkpoint, TOKENIZER, "cpu", torch.float32, lambda name, t: t.to(dtype_of(name, t)))


def plain_read(file: Path) -> None:
    """Read a file into fresh memory."""
    with file.open("rb") as stream, mmap.mmap(-1, file.stat().st_size) as memory:
        stream.readinto(memory)


def write(file: Path, config: EasyRefConfig) -> None:
    """A checkpoint of SDXL's sites with random bfloat16 weights."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes(config).items()}
    for name, tensor in tensors.items():
        fill(name, tensor, block)
    save(file, config, tuple(sdxl_widths()), tensors)


def shapes(config: EasyRefConfig) -> dict[str, tuple[int, ...]]:
    """{name in the model: shape} of every tensor of a checkpoint for SDXL."""
    return dict(expected_shapes(config, sdxl_widths()))


def held_rows(config: EasyRefConfig) -> list[Row]:
    """Bytes that the modules hold with fp8, counted at these sizes; part by part, to bfloat16."""
    fp8, bf16 = Counter(), Counter()
    for name, shape in shapes(config).items():
        if name.startswith("unet."):  # stays in the file
            continue
        part = "embeddings" if "embed_tokens" in name else PARTS[name.partition(".")[0]]
        tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        fp8[part] += tensor.numel() * in_fp8(name, tensor).itemsize
        bf16[part] += tensor.nbytes
    label, total = "held with fp8, counted at full size; to bfloat16: ", fp8.total()
    return [
        Row(f"{label}all", total / GIB, "GiB", total / bf16.total(), wanted=HALF),
        *(Row(f"{label}{part}", size / GIB, "GiB", size / bf16[part]) for part, size in fp8.items()),
    ]


def _loaded(name: str, file: Path, dtype_of: DtypeOf, options: Options, say: Say) -> list[Row]:
    pairs = interleaved(partial(plain_read, file), partial(load, file, dtype_of), options.pairs, say)
    rows = [pairs.row(f"{name}, page cache warm; to a plain read of the file")]
    if options.quick:  # so little may come from memory that the allocator holds
        return rows
    with PeakMemory() as peak:
        model = load(file, dtype_of)
    if peak.added is None:
        return rows
    weights = [*model.mllm.parameters(), *model.kv.parameters()]
    copied = sum(weight.nbytes for weight in weights if weight.dtype != torch.bfloat16)
    del model, weights
    gc.collect()
    label = f"{name}: most anonymous memory while loading"
    if not copied:
        return [*rows, Row(label, peak.added / GIB, "GiB")]
    ratio = peak.added / copied
    return [
        *rows,
        Row(f"{label}; to the copies held afterwards", peak.added / GIB, "GiB", ratio, wanted=MAX_PEAK),
    ]


def _largest_that_fits(config: EasyRefConfig) -> EasyRefConfig | None:
    """The config, with fewer MLLM layers where memory cannot hold a float32 copy, or the disk the file."""
    free, disk = psutil.virtual_memory().available, shutil.disk_usage(tempfile.gettempdir()).free
    for layers in range(config.body_layers, MIN_LAYERS - 1, -1):
        fewer = dataclasses.replace(config, body_layers=layers)
        values = sum(torch.Size(shape).numel() for shape in shapes(fewer).values())
        if values * 4 * 1.2 < free and values * 2 * 1.1 < disk:
            return fewer
    return None
