"""Node Encode Reference Group: group and prompt -> context states (EASYREF_CONTEXT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .group.fitting import fitting_size, image_sizes
from .group.summary import count_text, size_lines, small_group_notes
from .host import preview
from .host.images import split_group
from .host.inputs import IMAGE_PROMPT_ALIASES, group_input, instruction_input, prompt_input, size_input
from .host.notes import empty_prompt_note, image_notes, read_prompt
from .host.socket_types import EasyRefContext, EasyRefModel
from .host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from .host.hosted_model import HostedEasyRef

ERROR, LOWER = "error", "lower the size"  # choices for a group that is too large


@validates_inputs
class EasyRefEncodeGroup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefEncodeGroup",
            display_name="Encode Reference Group",
            category="EasyRef",
            description="Encodes group, instruction and prompt together with the multimodal LLM.",
            search_aliases=[*IMAGE_PROMPT_ALIASES, "ip adapter encoder", "reference encode"],
            has_intermediate_output=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="The EasyRef model, from Load EasyRef."),
                group_input(
                    "A reference group, or an image batch. EasyRef works best with 3 or more references."
                ),
                prompt_input(
                    "What to generate. Link one text node to this input and to SDXL's text encoders, so "
                    "that both get the same text; it should not be empty. Weights such as (smile:1.3), "
                    "embeddings and LoRA tags are removed. A choice {a|b} is an error here, because CLIP "
                    "Text Encode would draw its own."
                ),
                instruction_input(
                    "Instruction to the MLLM on what to look for; the prompt follows it directly. The "
                    "default is the one the released model was trained with, including the line break at "
                    "its end."
                ),
                size_input(
                    "Resolution in pixels: each reference is resized to about size x size at its own aspect "
                    "ratio. The size is rounded down to whole image tokens of 28 pixels. 336, as in "
                    "training, gives 121 to 145 image tokens per reference."
                ),
                io.Combo.Input(
                    "when_too_large",
                    options=[ERROR, LOWER],
                    default=ERROR,
                    optional=True,  # workflows queued by programs from before it have no value for it
                    advanced=True,
                    tooltip="What to do if the group is too long for the MLLM: stop, or encode all of it at "
                    "the largest size that fits its context and the device's memory. The size is shown.",
                ),
            ],
            outputs=[
                EasyRefContext.Output(
                    display_name="context", tooltip="Hidden states of the MLLM, before aggregation."
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
        references, (text, notes) = split_group(group), read_prompt(prompt)
        if when_too_large == LOWER and references:
            requested_size = size
            size = fitting_size(easyref, image_sizes(references), text, instruction, size)
            if size < requested_size:
                notes.append(
                    f"The size was lowered from {requested_size} to {size} pixels, so that the group fits."
                )
        prepared = easyref.model.prepare([image[0] for image in references], text, instruction, size)
        context = easyref.encode_prepared(prepared).masked(references.masks)
        budget = easyref.model.budget(image_sizes(references), text, instruction, size)
        lines = [
            f"{count_text(len(references))}, {budget.total:,} of {budget.limit:,} tokens.",
            *notes,
            *size_lines(budget),
            *small_group_notes(len(references)),
            empty_prompt_note(text),
            *image_notes(prepared),
        ]
        return io.NodeOutput(context, ui=preview.text("\n".join(filter(None, lines))))
