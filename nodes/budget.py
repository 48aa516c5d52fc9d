"""Group Budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..easyref_core import SIZE
from ..easyref_core.budget import Budget, budget, largest_size
from .references import split
from .sockets import EasyRefGroupSocket, EasyRefModel

if TYPE_CHECKING:
    from torch import Tensor

    from .mllm_patcher import HostedEasyRef

RATES = {"GPU, 100 TFLOP/s": 100e12, "GPU, 20 TFLOP/s": 20e12, "CPU, 0.2 TFLOP/s": 0.2e12}
FEW = 3  # references from which EasyRef works best


class EasyRefGroupBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupBudget",
            display_name="Group Budget",
            category="EasyRef",
            description="What a group will take before it is read: image tokens, memory, time. Gives the largest size at "
            "which it fits, for Encode Reference Group: up to 112 references.",
            search_aliases=["token count", "memory estimate", "reference size"],
            inputs=[
                EasyRefModel.Input("easyref", tooltip="The EasyRef model that will read the group."),
                io.MultiType.Input(
                    "group", [EasyRefGroupSocket, io.Image], tooltip="A reference group, or an image batch."
                ),
                io.Int.Input(
                    "size",
                    default=SIZE,
                    min=84,
                    max=1008,
                    step=28,
                    tooltip="The size you would like, in pixels; the output is this one or the next smaller that fits.",
                ),
            ],
            outputs=[
                io.Int.Output(
                    display_name="size",
                    tooltip="The largest size that fits: to the size of Encode Reference Group.",
                ),
                io.String.Output(display_name="report", tooltip="The budget in words, as shown in the node."),
            ],
        )

    @classmethod
    def execute(cls, easyref: HostedEasyRef, group: Tensor | tuple[Tensor, ...], size: int) -> io.NodeOutput:
        references = group if isinstance(group, tuple) else split(group)
        sizes = [tuple(reference.shape[1:3]) for reference in references]
        config = easyref.model.config
        fitting = largest_size(sizes, config, size)
        if fitting is None:
            raise ValueError(
                f"The group of {len(sizes)} references fits the MLLM's {config.max_positions:,} tokens at no size. "
                "Take fewer references."
            )
        found = budget(sizes, config, fitting, easyref.model.dtype.itemsize)
        report = described(found, sizes, size, fitting)
        return io.NodeOutput(fitting, report, ui=ui.PreviewText(report))


def described(found: Budget, sizes: list[tuple[int, int]], wanted: int, size: int) -> str:
    """A budget in words."""
    lines = [
        f"{len(sizes)} references at size {size}"
        + (f" (lowered from {wanted}, which does not fit)" if size < wanted else "")
        + (f"; EasyRef works best with {FEW} or more" if len(sizes) < FEW else ""),
        f"{found.tokens:,} of {found.limit:,} tokens with a text of ordinary length",
        f"at most {found.memory / 2**20:,.0f} MiB beside the weights",
        f"{found.operations / 1e12:,.2f} TFLOP: about "
        + ", ".join(f"{found.operations / rate:,.1f} s ({name})" for name, rate in RATES.items()),
    ]
    for number, ((height, width), seen, tokens) in enumerate(
        zip(sizes, found.sizes, found.image_tokens, strict=True), start=1
    ):
        lines.append(f"{number}: {width} x {height} -> {seen[1]} x {seen[0]}, {tokens} tokens")
    return "\n".join(lines)
