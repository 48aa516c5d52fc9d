"""Node Group Budget: estimates tokens, memory and time of encoding a group, without encoding it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management as mm
from comfy_api.latest import io

from ..host import preview
from ..host.images import split_group
from ..host.inputs import group_input, instruction_input, prompt_input, size_input
from ..host.notes import read_prompt
from ..host.socket_types import EasyRefModel
from ..host.validation import validates_inputs
from .fitting import image_sizes, usable_memory
from .summary import count_text, size_lines, small_group_notes

if TYPE_CHECKING:
    from torch import Tensor

    from ...easyref_core.mllm.budget import Budget
    from ..host.hosted_model import HostedEasyRef

GIB = 1024**3
ASSUMED_FLOPS_PER_SECOND = {"cpu": 2e11, "other": 3e13}  # until one encoding has been measured


@validates_inputs
class EasyRefGroupBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupBudget",
            display_name="Group Budget",
            category="EasyRef",
            description="Estimates what encoding a group will take: the tokens of each reference and of the "
            "whole group against the MLLM's maximum, the memory and the time. Nothing is encoded.",
            search_aliases=["token count", "memory estimate", "how many references"],
            is_output_node=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="The EasyRef model, from Load EasyRef."),
                group_input("A reference group, or an image batch."),
                prompt_input("The prompt that will be encoded with the group."),
                instruction_input("The instruction that will be encoded with the group."),
                size_input("Resolution in pixels at which the group will be encoded.", advanced=None),
            ],
            outputs=[
                io.Boolean.Output(
                    display_name="fits", tooltip="True if context and memory hold the group at this size."
                ),
                io.Int.Output(
                    display_name="largest_size",
                    tooltip="The largest size, up to the size asked for, at which the group fits; 0 if none "
                    "does.",
                ),
                io.String.Output(display_name="report", tooltip="The report that the node shows."),
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
        sizes = image_sizes(split_group(group))
        model, memory, (text, notes) = easyref.model, usable_memory(easyref), read_prompt(prompt)
        budget = model.budget(sizes, text, instruction, size)
        largest = model.largest_size(sizes, text, instruction, size, memory) or 0
        report = "\n".join(
            [
                verdict(budget, memory, largest),  # first, because a small node shows only the first lines
                f"{count_text(len(sizes))} at {size} pixels: {budget.total:,} of {budget.limit:,} tokens "
                f"({budget.text_tokens:,} of them text).",
                *notes,
                *size_lines(budget),
                *small_group_notes(len(sizes)),
                memory_line(easyref, budget),
                time_line(easyref, budget),
            ]
        )
        return io.NodeOutput(budget.fits(memory), largest, report, ui=preview.text(report))


def memory_line(easyref: HostedEasyRef, budget: Budget) -> str:
    """Return the memory that encoding needs beside the weights, and the device's."""
    device = easyref.model.device
    return (
        f"Memory: {budget.activation_bytes / GIB:.2f} GiB at most beside the weights "
        f"({easyref.patcher.model_size() / GIB:.2f} GiB); {device} has "
        f"{mm.get_total_memory(device) / GIB:.1f} GiB, {mm.get_free_memory(device) / GIB:.1f} free now."
    )


def time_line(easyref: HostedEasyRef, budget: Budget) -> str:
    """Return the estimated time of encoding."""
    assumed = ASSUMED_FLOPS_PER_SECOND["cpu" if easyref.model.device.type == "cpu" else "other"]
    rate, source = (easyref.rate, "measured at the last encoding") if easyref.rate else (assumed, "assumed")
    return (
        f"Time: about {budget.flops / rate:.1f} s ({budget.flops / 1e12:.3g} TFLOP counted, "
        f"{rate / 1e12:.3g} TFLOP/s {source})."
    )


def verdict(budget: Budget, memory: int, largest: int) -> str:
    """Return one sentence on whether the group fits, with the largest size or the remedy if it does not."""
    if budget.fits(memory):
        return "It fits."
    short = "the MLLM's context" if not budget.fits() else f"{memory / GIB:.1f} GiB of usable memory"
    if largest:
        return f"Warning: it does not fit {short}. The largest size that fits is {largest} pixels."
    return f"Warning: it does not fit {short} at any size. Remove references or shorten the prompt."
