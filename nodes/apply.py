"""Apply EasyRef."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .sockets import EasyRefModel, EasyRefTokens, TokenPair
from .unet_patch import condition

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .mllm_patcher import HostedEasyRef


class EasyRefApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefApply",
            display_name="Apply EasyRef",
            category="EasyRef",
            description="SDXL attends to the reference tokens beside the text, in all 70 cross-attentions.",
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
                    tooltip="Part of the denoising after which the references act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the denoising until which the references act.",
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
    ) -> io.NodeOutput:
        return io.NodeOutput(
            condition(model, easyref, tokens, weight, start_percent, end_percent, lora_strength)
        )
