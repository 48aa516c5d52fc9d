"""Reference Instruction."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..easyref_core.presets import CUSTOM, INSTRUCTIONS, LANGUAGES, instruction


class EasyRefInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefInstruction",
            display_name="Reference Instruction",
            category="EasyRef",
            description="What the MLLM is told to look for in the references: a preset, or a text of your own. The text "
            "that is used is shown after a run, and is kept with the tokens.",
            search_aliases=["instruction", "style transfer", "identity", "reference preset"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*INSTRUCTIONS, CUSTOM],
                    default="general",
                    tooltip="What to look for. general: the instruction the released model was trained with.",
                ),
                io.Combo.Input(
                    "language",
                    options=list(LANGUAGES),
                    default=LANGUAGES[0],
                    advanced=True,
                    tooltip="Language of the preset. Qwen2-VL reads both; the released model was trained with English.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="A text in the place of the preset's; empty: the preset's own. A line break is put at its end, "
                    "for the prompt follows directly.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="instruction", tooltip="To the instruction of Encode Reference Group."
                )
            ],
        )

    @classmethod
    def execute(cls, preset: str, language: str, text: str) -> io.NodeOutput:
        used = instruction(preset, language, text)
        return io.NodeOutput(used, ui=ui.PreviewText(used))
