"""Tiny Demo Model."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.latest import io

from ...easyref_core.tiny.demo_group import demo_group, in_common
from ...easyref_core.tiny.groups import OUTSIDER_FROM
from ...easyref_core.utils.prompt_syntax import plain_text
from ..host import folders
from ..host.validation import validates_inputs
from . import tiny_sdxl, tiny_text, tiny_vae

MIN_REFERENCES, MOST = 2, 6  # references of a group, as in training


@validates_inputs
class EasyRefDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefDemo",
            display_name="Tiny Demo Model",
            category="EasyRef/demo",
            description="A demonstration that needs no download: a tiny SDXL that comes with this pack, and a group of "
            "references for it. It paints 64 x 64 pixels of coloured shapes, nothing else. It stands in for the "
            "checkpoint loader, the text encoders and the images; what follows are the real EasyRef nodes.",
            search_aliases=["demo", "example", "try easyref"],
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What the picture shall have beside what the references share, in the model's few words: "
                    "'a thing on water at the left'. Empty: what the example group itself asks for.",
                ),
                io.String.Input(
                    "negative_prompt", tooltip="What to steer away from, in the same few words. May be empty."
                ),
                io.Int.Input(
                    "example",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Which group of references. What their picture shall be, no training has seen.",
                ),
                io.Int.Input(
                    "references",
                    default=4,
                    min=MIN_REFERENCES,
                    max=MOST,
                    tooltip="How many references the group has.",
                ),
                io.Boolean.Input(
                    "with_outsider",
                    default=False,
                    advanced=True,
                    tooltip="One reference shares nothing with the others. Trained in groups of "
                    f"{OUTSIDER_FROM} or more: of fewer it is hard to say who does not belong.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The tiny SDXL."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt, as the tiny SDXL reads it."
                ),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, likewise."),
                io.Vae.Output(tooltip="The tiny SDXL's VAE."),
                io.Image.Output(
                    display_name="references",
                    tooltip="The group's references, to Encode Reference Group (size 84 there) and a preview.",
                ),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The prompt that is used, to Encode Reference Group: both must read the same.",
                ),
                io.String.Output(
                    display_name="shared",
                    tooltip="What the references have in common, to compare the picture with. For people only.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> str:
        """A model trained anew is another one."""
        return folders.state_of(sorted(folders.tiny_base().rglob("*.safetensors")))

    @classmethod
    def execute(
        cls, prompt: str, negative_prompt: str, example: int, references: int, with_outsider: bool
    ) -> io.NodeOutput:
        base = folders.tiny_base()
        plan, pictures = demo_group(example, references, with_outsider)
        images = torch.from_numpy(pictures).float() / 255
        prompt = plain_text(prompt).strip() or plan.prompt
        positive, negative = conditionings(base, (prompt, plain_text(negative_prompt)))
        model, vae = tiny_sdxl.load_model(base), tiny_vae.load_vae(base)
        return io.NodeOutput(model, positive, negative, vae, images, prompt, in_common(plan))


def conditionings(base: Path, prompts: tuple[str, ...]) -> list[list]:
    """One CONDITIONING for each prompt."""
    states, pooled = tiny_text.encode_text(base, prompts)
    return [[[states[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in range(len(prompts))]
