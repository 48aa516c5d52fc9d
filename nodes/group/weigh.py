"""Node Weigh References: context states -> context states with a weight per reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ...easyref_core.utils.number_lists import parse_reference_weights
from ..host import preview
from ..host.socket_types import EasyRefContext
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from ...easyref_core import ContextStates


@validates_inputs
class EasyRefWeighReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWeighReferences",
            display_name="Weigh References",
            category="EasyRef",
            description="Lets single references count more or less when the reference tokens gather what "
            "the group shares. Goes between Encode and Aggregate, so the group is not encoded again.",
            search_aliases=["reference weight", "image weight", "ip adapter weight per image"],
            has_intermediate_output=True,
            inputs=[
                EasyRefContext.Input("context", tooltip="The encoded group, from Encode Reference Group."),
                io.String.Input(
                    "weights",
                    tooltip="One weight for each reference, in their order: 1, 0.5, 1. Or reference:weight "
                    "pairs, with 1 for all others: 2:0.5, 4-6:0. 1 changes nothing, 0 gathers nothing from "
                    "the reference, 4 is the maximum. Empty: 1 for all. Write decimals with a point.",
                ),
            ],
            outputs=[
                EasyRefContext.Output(
                    display_name="context", tooltip="The same context, for Aggregate Reference Tokens."
                )
            ],
        )

    @classmethod
    def execute(cls, context: ContextStates, weights: str) -> io.NodeOutput:
        values = parse_reference_weights(weights, "weights", len(context.spans))
        weighed = context.weighed(values)
        lines = [f"reference {i + 1}: {weight:g}" for i, weight in enumerate(values)]
        return io.NodeOutput(weighed, ui=preview.text("\n".join(lines)))
