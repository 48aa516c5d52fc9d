"""Base class and helpers of the nodes that make one set of tokens from several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ...easyref_core import ReferenceTokens
from ...easyref_core.tokens.frames import distinct
from ..host.socket_types import EasyRefTokens, TokenPair
from ..host.validation import unknown_input

PREFIX = "tokens"
ABSENT = object()  # an input that the prompt does not have


def several_tokens(limit: int, tooltip: str) -> io.Autogrow.Input:
    """Input of 1 to `limit` sockets tokens0, tokens1, ...; a new one appears when the last is connected."""
    return io.Autogrow.Input(
        PREFIX,
        template=io.Autogrow.TemplatePrefix(
            EasyRefTokens.Input("tokens", tooltip="Reference tokens of one group."),
            prefix=PREFIX,
            min=1,
            max=limit,
        ),
        tooltip=tooltip,
    )


class SeveralTokensNode(io.ComfyNode):
    """Base class of the nodes with an input of `several_tokens`."""

    @classmethod
    def validate_inputs(cls, tokens: Any = None, tokens0: Any = ABSENT) -> bool | str:
        """Return an error for an input tokens0, which programs write for tokens.tokens0; otherwise True.

        The host's own error would be misleading, because it calls the missing tokens.tokens0 just tokens0.
        """
        return True if tokens0 is ABSENT else unknown_input(cls, f"{PREFIX}0")


def in_order(tokens: Mapping[str, TokenPair | None]) -> list[TokenPair]:
    """Return the connected pairs in the order of the sockets: tokens10 comes after tokens9."""
    names = sorted(tokens, key=lambda socket: int(socket.removeprefix(PREFIX)))
    return [pair for name in names if (pair := tokens[name]) is not None]


def map_pairs(
    pairs: Sequence[TokenPair], combine: Callable[[list[ReferenceTokens]], ReferenceTokens]
) -> TokenPair:
    """Apply a function to the conditional and unconditional tokens; an unchanged pair is returned itself.

    Equal unconditional rows, as of the black image, become one row, which is used for every image. The result
    carries the model of the first pair that has one; all are of one checkpoint.
    """
    conditional = combine([pair.conditional for pair in pairs])
    unconditional = distinct(combine([_expand_unconditional(pair) for pair in pairs]))
    for pair in pairs:  # the same object, because its keys and values are cached by identity
        if conditional is pair.conditional and unconditional is pair.unconditional:
            return pair
    easyref = next((pair.easyref for pair in pairs if pair.easyref), None)
    return TokenPair(conditional, unconditional, easyref)


def _expand_unconditional(pair: TokenPair) -> ReferenceTokens:
    """Return the unconditional tokens with one row for each conditional row."""
    rows, tokens = len(pair.conditional), pair.unconditional
    if len(tokens) == rows:
        return tokens
    return ReferenceTokens.of(tokens.expand(rows, -1, -1), tokens.provenance)
