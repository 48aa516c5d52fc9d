"""torch.compile of ComfyUI's UNet with the nodes' patches, as ComfyUI's TorchCompileModel compiles it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tools.bench.comfyui import one_step
from tools.bench.gpu_parts.compiled import BACKEND, QUICK_BACKEND, compiled_rows
from tools.bench.gpu_parts.host_step import enter, models
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Row
from tools.bench.timing import Say


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Seconds of compiling, distance from the eager step, and time against it."""
    pack = enter(options)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    _, patched, name, pixels = models(pack, options)
    backend = QUICK_BACKEND if options.quick else BACKEND
    compiled = patched.clone()
    kept = {"guard_filter_fn": without_transformer_options}
    set_torch_compile_wrapper(model=compiled, backend=backend, options=kept)
    eager_step, compiled_step = (one_step(model, pixels) for model in (patched, compiled))
    yield from compiled_rows(f"torch.compile ({backend}), {name}", eager_step, compiled_step, options, say)


def without_transformer_options(guards: Sequence[Any]) -> list[bool]:
    """The guards that ComfyUI's node keeps."""
    return ["transformer_options" not in guard.name for guard in guards]
