"""Node Aggregate Reference Tokens: context states -> reference tokens (EASYREF_TOKENS)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .host.inputs import model_input
from .host.socket_types import EasyRefContext, EasyRefTokens
from .host.validation import validates_inputs

if TYPE_CHECKING:
    from .host.hosted_model import HostedEasyRef
    from .host.socket_types import HostedContext


BLACK, GROUP, NOISE = NEGATIVES = ("black image", "group", "noise")


@validates_inputs
class EasyRefAggregate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefAggregate",
            display_name="Aggregate Reference Tokens",
            category="EasyRef",
            description="Gathers what the references share into reference tokens: conditional ones, and "
            "unconditional ones, by default from a black image with the same instruction.",
            search_aliases=["reference tokens", "image embeds", "negative reference"],
            inputs=[
                EasyRefContext.Input("context", tooltip="The encoded group, from Encode Reference Group."),
                model_input("The context carries the model that encoded it"),
                io.Combo.Input(
                    "negative",
                    options=list(NEGATIVES),
                    default=BLACK,
                    optional=True,
                    advanced=True,
                    tooltip="What the unconditional tokens are made from; CFG steers away from it. black "
                    "image: as in training, unless negative_context is connected. group: the references of "
                    "negative_context. noise: a noise image.",
                ),
                EasyRefContext.Input(
                    "negative_context",
                    optional=True,
                    tooltip="A second encoded group to steer away from. Connecting it is enough: it is used "
                    "when negative is 'black image' or 'group'.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of the noise image (used when negative is 'noise').",
                ),
                io.Float.Input(
                    "noise_strength",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Brightness of the noise image (used when negative is 'noise'). 0 is the black "
                    "image.",
                ),
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="Reference tokens for Apply EasyRef.")
            ],
        )

    @classmethod
    def execute(
        cls,
        context: HostedContext,
        easyref: HostedEasyRef | None = None,
        negative: str = BLACK,
        negative_context: HostedContext | None = None,
        noise_seed: int = 0,
        noise_strength: float = 0.5,
    ) -> io.NodeOutput:
        # BLACK is the default, so a connected negative_context takes precedence; NOISE is an explicit choice
        if negative_context is not None and negative == NOISE:
            raise ValueError(
                f"negative_context is connected, but negative is {NOISE!r}, which would not use it. Set "
                f"negative to {GROUP!r}, or disconnect negative_context."
            )
        if negative_context is None and negative == GROUP:
            raise ValueError(
                f"negative is {GROUP!r}, but negative_context is not connected. Connect a second Encode "
                f"Reference Group to it, or set negative to {BLACK!r}."
            )
        strength = noise_strength if negative == NOISE else 0.0
        model = context.model_or(easyref)
        return io.NodeOutput(model.aggregate(context, negative_context, noise_seed, strength))
