"""Group Budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import comfy.model_management as mm
from comfy_api.latest import io

from ..host import preview
from ..host.images import references_of
from ..host.inputs import group_input, instruction_input, prompt_input, size_input
from ..host.notes import read_prompt
from ..host.socket_types import EasyRefModel
from ..host.validation import validates_inputs
from .reference_group import advice, count

if TYPE_CHECKING:
    from torch import Tensor

    from ...easyref_core.mllm.budget import Budget
    from ..host.hosted_model import HostedEasyRef

ERROR, LOWER = "error", "lower the size"  # what to do with a group that is too large
GIB = 1024**3
USABLE = 0.8  # of a device's memory, for what one encoding works in; weights may stay outside and be streamed
ASSUMED_RATE = {"cpu": 2e11, "other": 3e13}  # operations a second, until one encoding has been measured


@validates_inputs
class EasyRefGroupBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupBudget",
            display_name="Group Budget",
            category="EasyRef",
            description="What encoding a group will take, before it is encoded: tokens of each reference and of all "
            "against what the MLLM reads at most, memory, and about how long. Nothing is encoded.",
            search_aliases=["token count", "memory estimate", "how many references"],
            is_output_node=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="From Load EasyRef."),
                group_input("A reference group, or an image batch."),
                prompt_input("The prompt that will be encoded with the group."),
                instruction_input("The instruction that will be encoded with the group."),
                size_input("Pixels: the size to encode at.", advanced=None),
            ],
            outputs=[
                io.Boolean.Output(
                    display_name="fits", tooltip="Whether context and memory hold the group at this size."
                ),
                io.Int.Output(
                    display_name="largest_size",
                    tooltip="The largest size, at most the one asked for, at which the group fits; 0 where none does.",
                ),
                io.String.Output(display_name="report", tooltip="What is shown here."),
            ],
        )

    @classmethod
    def execute(
        cls,
        easyref: HostedEasyRef,
        group: Tensor | tuple[Tensor, ...],
        prompt: str,
        instruction: str,
        size: int,
    ) -> io.NodeOutput:
        pictures = sides(references_of(group))
        model, memory, (text, notes) = easyref.model, usable_memory(easyref), read_prompt(prompt)
        needed = model.budget(pictures, text, instruction, size)
        largest = model.largest_size(pictures, text, instruction, size, memory) or 0
        report = "\n".join(
            [
                verdict(needed, memory, largest),  # first, because a small node shows only the first lines
                f"{count(len(pictures))} at {size} pixels: {needed.total:,} of {needed.limit:,} tokens "
                f"({needed.text_tokens:,} of them text).",
                *notes,
                *read_as(needed),
                *advice(len(pictures)),
                memory_line(easyref, needed),
                time_line(easyref, needed),
            ]
        )
        return io.NodeOutput(needed.fits(memory), largest, report, ui=preview.text(report))


def sides(references: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Width and height of each reference (1, height, width, C)."""
    return [(image.shape[2], image.shape[1]) for image in references]


def lowered(
    easyref: HostedEasyRef, pictures: Sequence[tuple[int, int]], prompt: str, instruction: str, size: int
) -> int:
    """The largest size, at most `size`, at which a group fits; `size` itself where none does, for the error it gives."""
    found = easyref.model.largest_size(pictures, prompt, instruction, size, usable_memory(easyref))
    return found or size


def usable_memory(easyref: HostedEasyRef) -> int:
    """Bytes that one encoding may work in. Of all the device's memory, not of what is free now: the host makes room."""
    return int(USABLE * mm.get_total_memory(easyref.model.device))


def read_as(budget: Budget) -> list[str]:
    """How each reference is read, those that follow one another at one size in one line."""
    lines, first = [], 1
    for (width, height), same in groupby(budget.sides):
        last = first + len(list(same)) - 1
        which = f"reference {first}" if first == last else f"references {first}-{last}"
        lines.append(f"{which}: {width}x{height} pixels, {budget.tokens[first - 1]} tokens")
        first = last + 1
    return lines


def memory_line(easyref: HostedEasyRef, budget: Budget) -> str:
    device = easyref.model.device
    return (
        f"Memory: {budget.activation_bytes / GIB:.2f} GiB at most beside the weights "
        f"({easyref.patcher.model_size() / GIB:.2f} GiB); {device} has {mm.get_total_memory(device) / GIB:.1f} GiB, "
        f"{mm.get_free_memory(device) / GIB:.1f} free now."
    )


def time_line(easyref: HostedEasyRef, budget: Budget) -> str:
    assumed = ASSUMED_RATE["cpu" if easyref.model.device.type == "cpu" else "other"]
    rate, source = (easyref.rate, "measured at the last encoding") if easyref.rate else (assumed, "assumed")
    return (
        f"Time: about {budget.flops / rate:.1f} s ({budget.flops / 1e12:.3g} tera-operations counted, "
        f"{rate / 1e12:.3g} a second {source})."
    )


def verdict(budget: Budget, memory: int, largest: int) -> str:
    if budget.fits(memory):
        return "It fits."
    short = "the MLLM's context" if not budget.fits() else f"{memory / GIB:.1f} GiB of usable memory"
    if largest:
        return f"Warning: it does not fit {short}. The largest size that fits is {largest} pixels."
    return f"Warning: it does not fit {short} at any size. Remove references or shorten the prompt."
