"""Aggregate Reference Tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .sockets import EasyRefContext, EasyRefModel, EasyRefTokens

if TYPE_CHECKING:
    from ..easyref_core import ContextStates
    from .mllm_patcher import HostedEasyRef


class EasyRefAggregate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefAggregate",
            display_name="Aggregate Reference Tokens",
            category="EasyRef",
            description="The learned reference tokens gather what the references have in common. Makes the tokens of "
            "both sides: conditional, and unconditional from a black image with the same instruction.",
            search_aliases=["reference tokens", "image embeds"],
            inputs=[
                EasyRefModel.Input("easyref", tooltip="The model that encoded the group."),
                EasyRefContext.Input("context", tooltip="From Encode Reference Group."),
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="Reference tokens for Apply EasyRef.")
            ],
        )

    @classmethod
    def execute(cls, easyref: HostedEasyRef, context: ContextStates) -> io.NodeOutput:
        return io.NodeOutput(easyref.aggregate(context))
