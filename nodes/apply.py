"""Apply EasyRef."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..easyref_core.unet.layer_weights import LINEAR, WEIGHT_TYPES
from ..easyref_core.unet.reference_attention import SCALINGS
from .host import preview
from .host.notes import window_note
from .host.socket_types import EasyRefModel, EasyRefTokens, TokenPair
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
            description="SDXL attends to the reference tokens beside the text, in all 70 cross-attentions, or only in "
            "some layers, some steps or some part of the picture.",
            search_aliases=["ip adapter", "apply ipadapter", "reference", "style transfer"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SDXL model. LoRAs and other patches may come before or after."
                ),
                EasyRefModel.Input("easyref", tooltip="The EasyRef model that made the tokens."),
                EasyRefTokens.Input("tokens", tooltip="From Aggregate Reference Tokens."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Strength of the references beside the text. Lower is more diverse and less consistent. "
                    "0 leaves only the checkpoint's LoRA.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of the sampling at which the references start to act (0 = first step), for the "
                    "model that samples: ModelSampling nodes may come before or after this one.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of the sampling at which the references stop acting (1 = after the last step).",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the attention LoRA the checkpoint was trained with; 1 as in training. Of "
                    "several Apply nodes of one checkpoint the strongest counts, once. 0 with weight 0 is the "
                    "untouched model.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the image the references act; of any size, stretched over the whole image. A mask "
                    "batch is applied per image or frame; the last mask repeats. Without a mask: everywhere.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default=LINEAR,
                    optional=True,
                    advanced=True,
                    tooltip="How the weight is spread over the UNet's 11 layers. Style and composition lie in different "
                    "ones. The help page has a table.",
                ),
                io.String.Input(
                    "layer_weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Factors of your own in place of the weight type's, as index:weight, ... with the indices 0-3 "
                    "input, 4 middle, 5-10 output. Layers not named get 0. Write decimals with a point. Example: "
                    "3:1, 6:0.5",
                ),
                io.String.Input(
                    "weight_schedule",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Factors of the weight over the denoising: numbers, spread evenly from start_percent to "
                    "end_percent (1, 0.5, 0), or percent:weight pairs (0.2:1, 0.8:0). Between them the line. Write "
                    "decimals with a point. Empty: 1.",
                ),
                io.Combo.Input(
                    "embeds_scaling",
                    options=list(SCALINGS),
                    default=SCALINGS[0],
                    optional=True,
                    advanced=True,
                    tooltip="What the weight scales. V only is EasyRef's own way. With K the attention itself "
                    "grows sharper with the weight; C penalty weakens narrow layers; mean(V) scales only what the tokens "
                    "share.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, conditioned on the references.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        easyref: HostedEasyRef,
        tokens: TokenPair,
        weight: float,
        start_percent: float,
        end_percent: float,
        lora_strength: float,
        mask: Tensor | None = None,
        weight_type: str = LINEAR,
        layer_weights: str = "",
        weight_schedule: str = "",
        embeds_scaling: str = SCALINGS[0],
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
        patched = condition(model, easyref, tokens, settings)
        note = window_note(start_percent, end_percent) if weight else None
        return io.NodeOutput(patched, ui=preview.text(note) if note else None)
