"""Instruction."""

from __future__ import annotations

from comfy_api.latest import io

from ...easyref_core.mllm.presets import LANGUAGES, PRESETS
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
            description="What the MLLM is told to look for in the references: a text to choose, or your own. Connect it "
            "to Encode Reference Group's instruction. The text that is used is shown here after a run.",
            search_aliases=["style transfer", "face id", "composition", "character reference", "preset"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="general",
                    tooltip="What the references have in common. general is the text the released model was trained "
                    "with; the others are not, so compare. custom takes the text below.",
                ),
                io.Combo.Input(
                    "language",
                    options=list(LANGUAGES),
                    default=LANGUAGES[0],
                    advanced=True,
                    tooltip="Of the preset's text. The released model was trained in English.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    advanced=True,
                    tooltip="Your own text in place of the preset's, if it is not empty. The prompt follows it on a new "
                    "line. To edit a preset, copy its text from the help page.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="instruction", tooltip="To Encode Reference Group's instruction."
                )
            ],
        )

    @classmethod
    def execute(cls, preset: str, language: str, text: str) -> io.NodeOutput:
        instruction = chosen(preset, language, text)
        return io.NodeOutput(instruction, ui=preview.text(instruction))


def chosen(preset: str, language: str, text: str) -> str:
    """The instruction: `text`, ended by a line break, where there is one; else the preset's.

    Raises ValueError for a custom preset without a text.
    """
    if text.strip():
        return text if text.endswith("\n") else text + "\n"
    if preset == CUSTOM:
        raise ValueError(
            "The preset is custom and the text is empty. Write what the MLLM shall look for, or choose a preset."
        )
    return PRESETS[preset][language]
