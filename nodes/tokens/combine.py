"""Combine Reference Tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ...easyref_core.tokens.combine import METHODS, combine
from ...easyref_core.utils.errors import shorten
from ...easyref_core.utils.number_lists import parse_numbers
from ..host.socket_types import EasyRefTokens, TokenPair
from ..host.validation import validates_inputs
from .token_pairs import ABSENT, both_sides, in_order, several_tokens, validate_first_socket

MOST = 16


@validates_inputs
class EasyRefCombineTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCombineTokens",
            display_name="Combine Reference Tokens",
            category="EasyRef/tokens",
            description="One set of reference tokens from those of several groups: joined, averaged, added, subtracted, "
            "or on the way from one to another. Both sides of the guidance are combined alike.",
            search_aliases=["ip adapter combine embeds", "merge", "mix", "blend", "interpolate", "average"],
            inputs=[
                several_tokens(MOST, "Sets of tokens in order, all made by one EasyRef checkpoint."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="concat",
                    tooltip="concat: the UNet attends to every group's tokens. average: their mean. norm average: the "
                    "mean at the length the tokens had. add: their sum. subtract: the first less the mean of the "
                    "others. interpolate: between the first and the second.",
                ),
                io.Float.Input(
                    "factor",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Of interpolate alone: 0 is the first set, 1 the second.",
                ),
                io.String.Input(
                    "weights",
                    advanced=True,
                    tooltip="One number from 0 for each set, such as 1, 0.5. Empty, or fewer than there are sets: 1 for "
                    "the rest. 0 leaves a set out. Write decimals with a point.",
                ),
            ],
            outputs=[EasyRefTokens.Output(display_name="tokens", tooltip="For Apply EasyRef.")],
        )

    @classmethod
    def validate_inputs(cls, tokens: Any = None, tokens0: Any = ABSENT) -> bool | str:
        return validate_first_socket(cls, tokens0)

    @classmethod
    def execute(cls, tokens: dict[str, TokenPair], method: str, factor: float, weights: str) -> io.NodeOutput:
        pairs = in_order(tokens)
        make = partial(combine, method=method, weights=parse_weights(weights, len(pairs)), factor=factor)
        return io.NodeOutput(both_sides(pairs, make))


def parse_weights(text: str, count: int) -> list[float]:
    """ "1, 0.5" -> one weight for each of `count` sets, 1 where none is given."""
    weights = parse_numbers(text, "weights", example="1, 0.5")
    if len(weights) > count:
        raise ValueError(
            f"There are {len(weights)} weights ({shorten(text)}) for {count} sets of reference tokens. Remove the others, or "
            "connect what they are for."
        )
    return weights + [1.0] * (count - len(weights))
