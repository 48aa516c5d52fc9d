"""Node Apply EasyRef: MODEL and reference tokens -> MODEL that attends to the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..easyref_core.unet.layer_weights import LINEAR, WEIGHT_TYPES
from ..easyref_core.unet.reference_attention import SCALINGS, V_ONLY
from .host import preview
from .host.inputs import IMAGE_PROMPT_ALIASES, model_input
from .host.notes import window_note
from .host.socket_types import EasyRefTokens, TokenPair
from .host.validation import validates_inputs
from .unet_patch.condition import ApplySettings, condition

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from .host.hosted_model import HostedEasyRef


@validates_inputs
class EasyRefApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefApply",
            display_name="Apply EasyRef",
            category="EasyRef",
            description="Lets SDXL attend to the reference tokens beside the text, in all 70 "
            "cross-attentions, or only in some layers, some steps or some part of the image.",
            search_aliases=[*IMAGE_PROMPT_ALIASES, "apply ipadapter", "reference"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SDXL model. LoRAs and other patches may come before or after."
                ),
                EasyRefTokens.Input("tokens", tooltip="Reference tokens, from Aggregate Reference Tokens."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Strength of the references beside the text. A lower weight gives more diverse "
                    "and less consistent images. 0 leaves only the checkpoint's LoRA.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of the sampling at which the references start to act (0 = first "
                    "step), for the model that samples: ModelSampling nodes may come before or after this "
                    "one.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of the sampling at which the references stop acting (1 = after the "
                    "last step).",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the attention LoRA that the checkpoint was trained with; 1 as in "
                    "training. Several Apply nodes of one checkpoint add the LoRA once, at their largest "
                    "strength. 0 together with weight 0 gives the unpatched model.",
                ),
                model_input("Needed for tokens from Load Reference Tokens; others carry their model"),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the image the references act. A mask of any size is stretched over "
                    "the whole image. A mask batch is applied per image or frame; the last mask repeats. "
                    "Without a mask, the references act everywhere.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default=LINEAR,
                    optional=True,
                    advanced=True,
                    tooltip="How the weight is distributed over the UNet's 11 layers with cross-attention. "
                    "Style and composition depend on different layers. The help page has a table.",
                ),
                io.String.Input(
                    "layer_weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Your own factors in place of those of weight_type, as index:weight pairs with "
                    "the indices 0-3 input, 4 middle, 5-10 output. Layers that are not named get 0. Write "
                    "decimals with a point. Example: 3:1, 6:0.5",
                ),
                io.String.Input(
                    "weight_schedule",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Factors of the weight over the sampling: numbers spread evenly from "
                    "start_percent to end_percent (1, 0.5, 0), or percent:weight pairs (0.2:1, 0.8:0), with "
                    "linear interpolation in between. Write decimals with a point. Empty: 1.",
                ),
                io.Combo.Input(
                    "embeds_scaling",
                    options=list(SCALINGS),
                    default=V_ONLY,
                    optional=True,
                    advanced=True,
                    tooltip="What the weight scales. V only: the values, as EasyRef was trained. With K, "
                    "the attention also gets sharper as the weight grows; C penalty weakens narrow layers; "
                    "mean(V) scales only what the tokens share.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, conditioned on the references.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        tokens: TokenPair,
        weight: float,
        start_percent: float,
        end_percent: float,
        lora_strength: float,
        easyref: HostedEasyRef | None = None,
        mask: Tensor | None = None,
        weight_type: str = LINEAR,
        layer_weights: str = "",
        weight_schedule: str = "",
        embeds_scaling: str = V_ONLY,
    ) -> io.NodeOutput:
        settings = ApplySettings(
            weight=weight,
            start_percent=start_percent,
            end_percent=end_percent,
            lora_strength=lora_strength,
            mask=mask,
            weight_type=weight_type,
            layer_weights=layer_weights,
            weight_schedule=weight_schedule,
            embeds_scaling=embeds_scaling,
        )
        patched = condition(model, tokens.model_or(easyref), tokens, settings)
        note = window_note(start_percent, end_percent) if weight else None
        return io.NodeOutput(patched, ui=preview.text(note) if note else None)
