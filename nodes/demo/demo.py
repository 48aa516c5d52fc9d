"""Node Tiny Demo Model: tiny SDXL, its VAE, an EasyRef model and an example group."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from comfy_api.latest import io

from ...easyref_core.tiny.clip_text import encode_text
from ...easyref_core.tiny.demo_group import MAX_REFERENCES
from ...easyref_core.tiny.demo_groups import DEMO_GROUPS
from ...easyref_core.tiny.groups import OUTSIDER_FROM
from ...easyref_core.utils.errors import shorten
from ...easyref_core.utils.prompt_syntax import plain_text
from ..host import folders, preview
from ..host.validation import validates_inputs
from .tiny_sdxl import load_model
from .tiny_vae import load_vae

MIN_REFERENCES = 2  # of a group, as in training
SAVED_WORLD = "shapes"  # of workflows that were saved before there was a choice


@validates_inputs
class EasyRefDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefDemo",
            display_name="Tiny Demo Model",
            category="EasyRef/demo",
            description="A demonstration without a download: a tiny SDXL that comes with this pack, and "
            "references for it. It paints 64 x 64 pixels of creatures or of coloured shapes, nothing else. "
            "It replaces the checkpoint loader, the text encoders and the images; the nodes after it are the "
            "real ones.",
            search_aliases=["demo", "example", "try easyref"],
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What the image should show besides what the references share, in the model's "
                    "few words: 'a creature on water at the left'. Empty: the example group's own prompt.",
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
                    tooltip="Number of the example group. Its creature, or the target of the shapes, was not "
                    "in the training data.",
                ),
                io.Int.Input(
                    "references",
                    default=4,
                    min=MIN_REFERENCES,
                    max=MAX_REFERENCES,
                    tooltip="Number of references in the group. More references extend the same group.",
                ),
                io.Boolean.Input(
                    "with_outsider",
                    default=False,
                    advanced=True,
                    tooltip="Adds a reference that does not belong to the others, at the end. The shapes "
                    f"were trained with one in groups of {OUTSIDER_FROM} or more, the creatures without.",
                ),
                io.Combo.Input(
                    "world",
                    options=list(DEMO_GROUPS),
                    default=SAVED_WORLD,
                    optional=True,
                    tooltip="What the tiny model paints. Creatures: the references share one creature, and "
                    "each also shows others. Shapes: they share attributes, such as a colour. Choose the "
                    "checkpoint and the MLLM of the same world in Load EasyRef, and size 64 for creatures or "
                    "84 for shapes in Encode Reference Group.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The tiny SDXL."),
                io.Conditioning.Output(display_name="positive", tooltip="The positive conditioning."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative conditioning."),
                io.Vae.Output(tooltip="The tiny SDXL's VAE."),
                io.Image.Output(
                    display_name="references",
                    tooltip="The group's references, for Encode Reference Group (size 64 for creatures, "
                    "84 for shapes) and a preview.",
                ),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The prompt used, for Encode Reference Group: both must get the same text.",
                ),
                io.String.Output(
                    display_name="shared",
                    tooltip="What the references have in common, as text to compare the image with.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, world: str = SAVED_WORLD, **_: object) -> str:
        """Return a fingerprint of the model's files, which changes when it is trained again."""
        return folders.state_of(sorted(folders.tiny_base(world).rglob("*.safetensors")))

    @classmethod
    def execute(
        cls,
        prompt: str,
        negative_prompt: str,
        example: int,
        references: int,
        with_outsider: bool,
        world: str = SAVED_WORLD,
    ) -> io.NodeOutput:
        base = folders.tiny_base(world)
        group = DEMO_GROUPS[world].demo_group(example, references, with_outsider)
        images = torch.from_numpy(group.references).float() / 255
        prompts = plain_text(prompt).strip() or group.prompt, plain_text(negative_prompt)
        models = load_model(base), *conditionings(base, prompts), load_vae(base)
        unknown = unknown_words(prompts, DEMO_GROUPS[world].WORDS)
        note = [f"Prompt: {prompts[0]}", f"Shared: {group.shared}", unknown]
        ui = preview.text("\n".join(filter(None, note)))
        return io.NodeOutput(*models, images, prompts[0], group.shared, ui=ui)


def unknown_words(prompts: Iterable[str], known: Collection[str]) -> str | None:
    """A warning that names the words of prompts that a tiny model was not trained on."""
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt))
    unknown = [repr(word) for word in words if word not in known]
    if not unknown:
        return None
    return (
        f"Warning: the tiny model was not trained on {shorten(', '.join(unknown))}. Its words are: "
        f"{', '.join(sorted(known))}."
    )


def conditionings(base: Path, prompts: tuple[str, ...]) -> list[list]:
    """Return one CONDITIONING for each prompt."""
    states, pooled = encode_text(base, prompts)
    return [[[states[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in range(len(prompts))]
