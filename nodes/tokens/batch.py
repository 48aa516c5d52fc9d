"""Batch Reference Tokens."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...easyref_core.tokens.frames import batch
from ..host.socket_types import EasyRefTokens, TokenPair
from ..host.validation import validates_inputs
from .token_pairs import ABSENT, both_sides, in_order, several_tokens, validate_first_socket

MOST = 100


@validates_inputs
class EasyRefBatchTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefBatchTokens",
            display_name="Batch Reference Tokens",
            category="EasyRef/tokens",
            description="Tokens of several groups, one for each picture of a latent batch or frame of an animation.",
            search_aliases=["ip adapter batch", "animatediff", "per frame", "batch embeds"],
            inputs=[several_tokens(MOST, "One set for each picture, in order. A batch counts as its rows.")],
            outputs=[
                EasyRefTokens.Output(
                    display_name="tokens", tooltip="A batch of tokens, for Apply EasyRef and a latent batch."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, tokens: Any = None, tokens0: Any = ABSENT) -> bool | str:
        return validate_first_socket(cls, tokens0)

    @classmethod
    def execute(cls, tokens: dict[str, TokenPair]) -> io.NodeOutput:
        return io.NodeOutput(both_sides(in_order(tokens), batch))
