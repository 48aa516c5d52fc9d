"""Reference Tokens over Frames."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ...easyref_core.tokens.frames import EASINGS, over_frames
from ..host.socket_types import EasyRefTokens, TokenPair
from ..host.validation import validates_inputs
from .token_pairs import ABSENT, both_sides, in_order, several_tokens, validate_first_socket

MOST = 100


@validates_inputs
class EasyRefTokensOverFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefTokensOverFrames",
            display_name="Reference Tokens over Frames",
            category="EasyRef/tokens",
            description="A cross-fade through the tokens of several groups: a batch with one set for each frame.",
            search_aliases=[
                "ip adapter weights",
                "animatediff",
                "cross-fade",
                "morph",
                "keyframes",
                "travel",
            ],
            inputs=[
                several_tokens(MOST, "What the fade goes through, in order: the first frame, ..., the last."),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="How many frames or pictures there are: the batch size of the latent.",
                ),
                io.Combo.Input(
                    "easing",
                    options=list(EASINGS),
                    default="linear",
                    tooltip="How each fade from one set to the next runs: evenly, or slower at its start (ease in), at "
                    "its end (ease out) or at both.",
                ),
            ],
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
    def execute(cls, tokens: dict[str, TokenPair], frames: int, easing: str) -> io.NodeOutput:
        make = partial(over_frames, frames=frames, easing=easing)
        return io.NodeOutput(both_sides(in_order(tokens), make))
