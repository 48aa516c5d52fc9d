"""Encode Reference Group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .group.budget import ERROR, LOWER, lowered, read_as, sides
from .group.reference_group import advice, count
from .host import preview
from .host.images import references_of
from .host.inputs import group_input, instruction_input, prompt_input, size_input
from .host.notes import empty_prompt_note, image_notes, read_prompt
from .host.socket_types import EasyRefContext, EasyRefModel
from .host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from .host.hosted_model import HostedEasyRef


@validates_inputs
class EasyRefEncodeGroup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefEncodeGroup",
            display_name="Encode Reference Group",
            category="EasyRef",
            description="The multimodal LLM reads all references together with the instruction and the prompt.",
            search_aliases=["ip adapter encoder", "reference encode"],
            has_intermediate_output=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="From Load EasyRef."),
                group_input(
                    "A reference group, or an image batch. EasyRef works best with 3 or more references."
                ),
                prompt_input(
                    "What to generate. Link one text node to this input and to SDXL's text encoders, so that they read "
                    "the same; it should not be empty. Weights such as (smile:1.3), embeddings and LoRA tags are left "
                    "out of what the MLLM reads. A choice {a|b} is an error here: CLIP Text Encode would draw its own."
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
        references, (text, notes) = references_of(group), read_prompt(prompt)
        if when_too_large == LOWER and references:
            input_size, size = size, lowered(easyref, sides(references), text, instruction, size)
            if size < input_size:
                notes.append(
                    f"The size was lowered from {input_size} to {size} pixels, so that the group fits."
                )
        prepared = easyref.model.prepare([image[0] for image in references], text, instruction, size)
        context = easyref.encode_prepared(prepared)
        budget = easyref.model.budget(sides(references), text, instruction, size)
        lines = [
            f"{count(len(references))}, {budget.total:,} of {budget.limit:,} tokens.",
            *notes,
            *read_as(budget),
            *advice(len(references)),
            empty_prompt_note(text),
            *image_notes(prepared),
        ]
        return io.NodeOutput(context, ui=preview.text("\n".join(filter(None, lines))))
