"""Encode Reference Group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..easyref_core import INSTRUCTION, SIZE
from .references import split
from .sockets import EasyRefContext, EasyRefGroupSocket, EasyRefModel

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
                io.MultiType.Input(
                    "group",
                    [EasyRefGroupSocket, io.Image],
                    tooltip="A reference group, or an image batch. EasyRef works best with 3 or more references.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to generate: the same prompt as for SDXL's text encoders, where it should not be empty.",
                ),
                io.String.Input(
                    "instruction",
                    default=INSTRUCTION,
                    multiline=True,
                    advanced=True,
                    tooltip="What the MLLM is told to look for; the prompt follows it directly. The default is the one "
                    "the released model was trained with, line break at the end included.",
                ),
                io.Int.Input(
                    "size",
                    default=SIZE,
                    min=84,
                    max=1008,
                    step=28,
                    advanced=True,
                    tooltip="Pixels: each reference is resized to about size x size at its own aspect. 336, as in "
                    "training, gives 121 to 145 image tokens a reference.",
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
    ) -> io.NodeOutput:
        references = group if isinstance(group, tuple) else split(group)
        return io.NodeOutput(easyref.encode([image[0] for image in references], prompt, instruction, size))
