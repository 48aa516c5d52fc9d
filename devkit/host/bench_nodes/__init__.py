"""A test-only pack for benchmarks: conditionings of SDXL's size, and an artificial limit of device memory.

BENCH_DEVICE_GIB: the memory of the device, in GiB, that torch may use in this server; not limited without it.
"""

from __future__ import annotations

import os

import torch
from comfy_api.latest import ComfyExtension, io

GIB = 2**30
WIDTH, POOLED, TOKENS = 2048, 1280, 77

if limit := os.environ.get("BENCH_DEVICE_GIB"):
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(limit) * GIB / total))


class RandomConditioning(io.ComfyNode):
    """A random conditioning of SDXL's widths, in place of two text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RandomConditioning",
            category="testing",
            inputs=[io.Int.Input("seed", default=0)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        random = torch.Generator().manual_seed(seed)
        text = torch.randn(1, TOKENS, WIDTH, generator=random)
        pooled = torch.randn(1, POOLED, generator=random)
        return io.NodeOutput([[text, {"pooled_output": pooled}]])


class BenchNodes(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RandomConditioning]


async def comfy_entrypoint() -> BenchNodes:
    return BenchNodes()
