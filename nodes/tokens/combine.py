"""Nodes that combine or batch sets of reference tokens, or spread them over frames."""

from __future__ import annotations

from functools import partial

from comfy_api.latest import io

from ...easyref_core.tokens.combine import METHODS, combine
from ...easyref_core.tokens.frames import EASINGS, batch, over_frames
from ...easyref_core.utils.errors import shorten
from ...easyref_core.utils.number_lists import parse_numbers
from ..host.socket_types import EasyRefTokens, TokenPair
from ..host.validation import validates_inputs
from .token_pairs import SeveralTokensNode, in_order, map_pairs, several_tokens

MAX_COMBINED, MAX_BATCHED = 16, 100  # sets of tokens


@validates_inputs
class EasyRefCombineTokens(SeveralTokensNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCombineTokens",
            display_name="Combine Reference Tokens",
            category="EasyRef/tokens",
            description="Combines the reference tokens of several groups into one set: joined, averaged, "
            "added, subtracted or interpolated. Conditional and unconditional tokens are combined alike.",
            search_aliases=["ip adapter combine embeds", "merge", "mix", "blend", "interpolate", "average"],
            inputs=[
                several_tokens(MAX_COMBINED, "Sets of tokens, in order, all made by one EasyRef checkpoint."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="concat",
                    tooltip="concat: the UNet attends to every group's tokens. average: the mean. norm "
                    "average: the mean at the mean norm of the tokens. add: the sum. subtract: the first "
                    "set minus the mean of the others. interpolate: between the first and the second set.",
                ),
                io.Float.Input(
                    "factor",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Used when method is 'interpolate': 0 is the first set, 1 the second.",
                ),
                io.String.Input(
                    "weights",
                    advanced=True,
                    tooltip="One number of 0 or more for each set, such as 1, 0.5. Sets without a number "
                    "get 1; 0 leaves a set out. Write decimals with a point.",
                ),
            ],
            outputs=[EasyRefTokens.Output(display_name="tokens", tooltip="Tokens for Apply EasyRef.")],
        )

    @classmethod
    def execute(cls, tokens: dict[str, TokenPair], method: str, factor: float, weights: str) -> io.NodeOutput:
        pairs = in_order(tokens)
        make = partial(combine, method=method, weights=parse_weights(weights, len(pairs)), factor=factor)
        return io.NodeOutput(map_pairs(pairs, make))


@validates_inputs
class EasyRefBatchTokens(SeveralTokensNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefBatchTokens",
            display_name="Batch Reference Tokens",
            category="EasyRef/tokens",
            description="Batches the tokens of several groups, one set for each latent image or frame.",
            search_aliases=["ip adapter batch", "animatediff", "per frame", "batch embeds"],
            inputs=[
                several_tokens(MAX_BATCHED, "One set for each image, in order. A batch counts as its rows.")
            ],
            outputs=[batch_output()],
        )

    @classmethod
    def execute(cls, tokens: dict[str, TokenPair]) -> io.NodeOutput:
        return io.NodeOutput(map_pairs(in_order(tokens), batch))


@validates_inputs
class EasyRefTokensOverFrames(SeveralTokensNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefTokensOverFrames",
            display_name="Reference Tokens over Frames",
            category="EasyRef/tokens",
            description="Cross-fades through the tokens of several groups, with one set for each frame.",
            search_aliases=[
                "ip adapter weights",
                "animatediff",
                "cross-fade",
                "morph",
                "keyframes",
                "travel",
            ],
            inputs=[
                several_tokens(
                    MAX_BATCHED, "Sets to fade through, in order: the first frame, ..., the last."
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Number of frames or images: the batch size of the latent.",
                ),
                io.Combo.Input(
                    "easing",
                    options=list(EASINGS),
                    default="linear",
                    tooltip="How each fade from one set to the next runs: evenly (linear), or slower at its "
                    "start (ease in), at its end (ease out) or at both (ease in-out).",
                ),
            ],
            outputs=[batch_output()],
        )

    @classmethod
    def execute(cls, tokens: dict[str, TokenPair], frames: int, easing: str) -> io.NodeOutput:
        make = partial(over_frames, frames=frames, easing=easing)
        return io.NodeOutput(map_pairs(in_order(tokens), make))


def batch_output() -> EasyRefTokens.Output:
    """Output with a row of tokens for each image or frame."""
    tooltip = "A batch of tokens, for Apply EasyRef and a latent batch."
    return EasyRefTokens.Output(display_name="tokens", tooltip=tooltip)


def parse_weights(text: str, count: int) -> list[float]:
    """Return one weight for each of `count` sets from a list such as "1, 0.5"; missing ones are 1."""
    weights = parse_numbers(text, "weights", example="1, 0.5")
    if len(weights) > count:
        raise ValueError(
            f"There are {len(weights)} weights ({shorten(text)}) for {count} sets of reference tokens. "
            "Remove the extra weights, or connect the missing sets."
        )
    return weights + [1.0] * (count - len(weights))
