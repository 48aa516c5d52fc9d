"""Time and memory of loading a checkpoint of the released layout, with random weights, from a warm page cache.

Loading is timed in pairs with a plain read of the same file into fresh memory, which is the least that copying it can take. A
checkpoint loaded as it is stored stays mapped and copies nothing. Memory is anonymous memory: pages of the mapped file, which
the system can take back, are not in it.
"""

from __future__ import annotations

import dataclasses
import gc
import mmap
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from easyref_core.checkpoint.checkpoint import expected_shapes, may_be_fp8, open_checkpoint, save
from easyref_core.model import EasyRef, build
from easyref_core.training.full_size import EASYREF
from easyref_core.unet.layout import Site, sdxl_sites
from tools.bench.machine import free_bytes
from tools.bench.random_weights import BLOCK, fill
from tools.bench.rows import Limit, Options, Row
from tools.bench.timing import interleaved, peak_memory

if TYPE_CHECKING:
    from torch import Tensor

    from easyref_core.mllm.config import EasyRefConfig

Say = Callable[[str], None]
KeptAs = Callable[[str, "Tensor"], torch.dtype]  # name in the model, tensor -> how it is kept

TOKENIZER = Path(__file__).parents[2] / "easyref_core" / "tiny" / "weights" / "tiny-qwen2-vl"
PEAK = Limit("<=", 1.1)
HALF = Limit("<=", 0.505)  # to two digits; norms and biases take as much as before
# fmt: skip
SMALL = dataclasses.replace(
    EASYREF,
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=128,
    body_layers=2,
    vision_depth=2,
    projector_width=64,
    token_width=64,
    vision_width=64,
    vision_mlp_width=128,
    heads=4,
    kv_heads=2,
    vision_heads=2,
    lora_rank=1,
)
FEWEST_LAYERS = 3
GIB = 2**30


def measure(options: Options, say: Say) -> list[Row]:
    """Seconds and peak memory of each precision, and what fp8 holds."""
    config = SMALL if options.quick else _that_fits(EASYREF)
    if config is None:
        say("  left out: neither memory nor disk have room for a few of the MLLM's layers.")
        return []
    layers = "" if config.body_layers == EASYREF.body_layers else f", {config.body_layers} of 27 layers"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "easyref.safetensors"
        say(f"  writing a checkpoint with random weights{layers}")
        write(file, config)
        name = f"load {file.stat().st_size / GIB:.2f} GiB in bfloat16{' of small shapes' if options.quick else layers}"
        rows = []
        for what, kept in PRECISIONS.items():
            say(f"  {what}: plain read, load")
            rows += _loaded(f"{name}, {what}", file, kept, options, say)
    return rows + held_rows(EASYREF)


def as_stored(_: str, tensor: Tensor) -> torch.dtype:
    return tensor.dtype


def in_float32(_: str, __: Tensor) -> torch.dtype:
    return torch.float32


def in_fp8(name: str, tensor: Tensor) -> torch.dtype:
    """As the nodes' fp8_e4m3fn keeps them, on a device that looks up fp8."""
    return torch.float8_e4m3fn if may_be_fp8(name, tensor) else tensor.dtype


PRECISIONS: dict[str, KeptAs] = {"as stored": as_stored, "to float32": in_float32, "to fp8": in_fp8}


def load(file: Path, kept: KeptAs) -> EasyRef:
    """The model with each weight kept as `kept` says; what is kept as it is stored stays mapped."""
    return build(open_checkpoint(file), TOKENIZER, "cpu", torch.float32, lambda name, t: t.to(kept(name, t)))


def plain_read(file: Path) -> None:
    """The file, read into fresh memory."""
    with file.open("rb") as stream, mmap.mmap(-1, file.stat().st_size) as memory:
        stream.readinto(memory)


def write(file: Path, config: EasyRefConfig) -> None:
    """A checkpoint of SDXL's sites with random bfloat16 weights."""
    sites = tuple(sdxl_sites())
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes(config).items()}
    for name, tensor in tensors.items():
        fill(name, tensor, block)
    save(file, config, sites, tensors)


def shapes(config: EasyRefConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a checkpoint for SDXL, by its name in the model."""
    return dict(expected_shapes(config, {site: _width(site) for site in sdxl_sites()}))


def held_rows(config: EasyRefConfig) -> list[Row]:
    """What the modules hold with fp8, counted at these sizes; part by part, to bfloat16."""
    found: dict[str, list[int]] = {}
    for name, shape in shapes(config).items():
        if name.startswith("unet."):  # stays in the file
            continue
        part = "embeddings" if "embed_tokens" in name else PARTS[name.partition(".")[0]]
        tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        sizes = tensor.numel() * in_fp8(name, tensor).itemsize, tensor.nbytes
        found[part] = [a + b for a, b in zip(found.get(part, (0, 0)), sizes, strict=True)]
    whole = [sum(sizes) for sizes in zip(*found.values(), strict=True)]
    label = "held with fp8, counted at full size; to bfloat16: "
    return [
        Row(f"{label}all", whole[0] / GIB, "GiB", whole[0] / whole[1], wanted=HALF),
        *(Row(f"{label}{part}", fp8 / GIB, "GiB", fp8 / bf16) for part, (fp8, bf16) in found.items()),
    ]


PARTS = {
    "encoder": "vision tower and MLLM body",
    "aggregator": "last layer, reference tokens and projector",
    "kv": "K and V projections",
}


def _loaded(name: str, file: Path, kept: KeptAs, options: Options, say: Say) -> list[Row]:
    pairs = interleaved(partial(plain_read, file), partial(load, file, kept), options.pairs, say)
    rows = [pairs.row(f"{name}, page cache warm; to a plain read of the file")]
    if options.quick:  # so little comes from what the allocator has kept
        return rows
    with peak_memory() as peak:
        model = load(file, kept)
    if peak.added is None:
        return rows
    copied = _copied_bytes(model)
    del model
    gc.collect()
    if not copied:
        return [*rows, Row(f"{name}: most anonymous memory while loading", peak.added / GIB, "GiB")]
    label = f"{name}: most anonymous memory while loading; to the copies held afterwards"
    return [*rows, Row(label, peak.added / GIB, "GiB", peak.added / copied, wanted=PEAK)]


def _copied_bytes(model: EasyRef) -> int:
    """Bytes of the weights that are no longer the file's own."""
    weights = [*model.mllm.parameters(), *model.kv.parameters()]
    return sum(weight.nbytes for weight in weights if weight.dtype != torch.bfloat16)


def _that_fits(config: EasyRefConfig) -> EasyRefConfig | None:
    """The config, with fewer layers of the MLLM body where memory cannot hold a float32 copy, or the disk the file."""
    free, disk = free_bytes(), shutil.disk_usage(tempfile.gettempdir()).free
    for layers in range(config.body_layers, FEWEST_LAYERS - 1, -1):
        fewer = dataclasses.replace(config, body_layers=layers)
        values = sum(torch.Size(shape).numel() for shape in shapes(fewer).values())
        if values * 4 * 1.2 < (free or values * 5) and values * 2 * 1.1 < disk:
            return fewer
    return None


def _width(site: Site) -> int:
    """Of SDXL's attentions: 640 where latents are halved, 1280 where they are quartered and in the middle."""
    return (
        640
        if (site.block == "input" and site.number < 7) or (site.block == "output" and site.number > 2)
        else 1280
    )
