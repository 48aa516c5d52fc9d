"""Node Reference Instruction: preset, or text of one's own -> instruction to the MLLM."""

from __future__ import annotations

from comfy_api.latest import io

from ...easyref_core.mllm.instructions import LANGUAGES, PRESETS
from ..host import preview
from ..host.validation import validates_inputs

CUSTOM = "custom"


@validates_inputs
class EasyRefInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefInstruction",
            display_name="Reference Instruction",
            category="EasyRef",
            description="Instruction to the MLLM on what to look for in the references: a preset, or your "
            "own text. Connect it to Encode Reference Group's instruction. The node shows it after a run.",
            search_aliases=["style transfer", "face id", "composition", "character reference", "preset"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="general",
                    tooltip="What the references have in common. 'general' is the text the released model "
                    "was trained with; the others are not, so compare. 'custom' uses the text below.",
                ),
                io.Combo.Input(
                    "language",
                    options=list(LANGUAGES),
                    default=LANGUAGES[0],
                    advanced=True,
                    tooltip="Language of the preset's text. The released model was trained in English.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    advanced=True,
                    tooltip="Your own text, used in place of the preset's unless it is empty. The prompt "
                    "follows it on a new line. To edit a preset, copy its text from the help page.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="instruction", tooltip="The instruction, for Encode Reference Group."
                )
            ],
        )

    @classmethod
    def execute(cls, preset: str, language: str, text: str) -> io.NodeOutput:
        instruction = instruction_text(preset, language, text)
        return io.NodeOutput(instruction, ui=preview.text(instruction))


def instruction_text(preset: str, language: str, text: str) -> str:
    """Return `text` with a line break at its end, or the preset's text if `text` is empty.

    Raises ValueError for the custom preset without a text.
    """
    if text.strip():
        return text if text.endswith("\n") else text + "\n"
    if preset == CUSTOM:
        raise ValueError(
            "The preset is custom and the text is empty. Write what the MLLM should look for, or choose a "
            "preset."
        )
    return PRESETS[preset][language]
