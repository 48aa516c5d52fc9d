"""Encode Reference Group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import shown
from .group_budget import ERROR, LOWER, lowered, read_as, sides
from .inputs import group_input, instruction_input, size_input
from .pictures import references_of
from .references import advice, count
from .sockets import EasyRefContext, EasyRefModel

if TYPE_CHECKING:
    from torch import Tensor

    from .mllm_patcher import HostedEasyRef


class EasyRefEncodeGroup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefEncodeGroup",
            display_name="Encode Reference Group",
            category="EasyRef",
            description="The multimodal LLM reads all references together with the instruction and the prompt.",
            search_aliases=["ip adapter encoder", "reference encode"],
            inputs=[
                EasyRefModel.Input("easyref", tooltip="From Load EasyRef."),
                group_input(
                    "A reference group, or an image batch. EasyRef works best with 3 or more references."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to generate: the same prompt as for SDXL's text encoders, where it should not be empty.",
                ),
                instruction_input(
                    "What the MLLM is told to look for; the prompt follows it directly. The default is the one "
                    "the released model was trained with, line break at the end included."
                ),
                size_input(
                    "Pixels: each reference is resized to about size x size at its own aspect. 336, as in "
                    "training, gives 121 to 145 image tokens a reference."
                ),
                io.Combo.Input(
                    "when_too_large",
                    options=[ERROR, LOWER],
                    default=ERROR,
                    optional=True,  # workflows queued by programs from before it have no value for it
                    advanced=True,
                    tooltip="What to do with a group that is too long for the MLLM: stop, or read all of it at the "
                    "largest size at which it fits the MLLM's context and the device's memory. The size is shown.",
                ),
            ],
            outputs=[
                EasyRefContext.Output(
                    display_name="context", tooltip="What the MLLM read, before aggregation."
                )
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
        when_too_large: str = ERROR,
    ) -> io.NodeOutput:
        references = references_of(group)
        images, notes = [image[0] for image in references], []
        if when_too_large == LOWER and images:
            asked, size = size, lowered(easyref, sides(references), prompt, instruction, size)
            if size < asked:
                notes = [f"The size was lowered from {asked} to {size} pixels, so that the group fits."]
        context = easyref.encode(images, prompt, instruction, size)
        took = easyref.model.budget(sides(references), prompt, instruction, size)
        lines = [
            f"{count(len(images))}, {took.total:,} of {took.limit:,} tokens.",
            *notes,
            *read_as(took),
            *advice(len(images)),
        ]
        return io.NodeOutput(context, ui=shown.text("\n".join(lines)))
