"""What the nodes that make one set of tokens from several share: their sockets, and both sides done alike."""

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


def several_tokens(most: int, tooltip: str) -> io.Autogrow.Input:
    """An input of 1 to `most` sockets, tokens0, tokens1, ...; a new one appears when the last is connected."""
    return io.Autogrow.Input(
        PREFIX,
        template=io.Autogrow.TemplatePrefix(
            EasyRefTokens.Input("tokens", tooltip="Reference tokens of one group."),
            prefix=PREFIX,
            min=1,
            max=most,
        ),
        tooltip=tooltip,
    )


def validate_first_socket(node: type[io.ComfyNode], tokens0: Any) -> bool | str:
    """Result of a node's validate_inputs: an error for tokens0, which programs write for tokens.tokens0.

    The host then misses tokens.tokens0 and calls it tokens0 in its own error.
    """
    return True if tokens0 is ABSENT else unknown_input(node, f"{PREFIX}0")


def in_order(tokens: Mapping[str, TokenPair | None]) -> list[TokenPair]:
    """What is connected, in the order of the sockets: tokens10 comes after tokens9."""
    names = sorted(tokens, key=lambda socket: int(socket.removeprefix(PREFIX)))
    return [pair for name in names if (pair := tokens[name]) is not None]


def both_sides(
    pairs: Sequence[TokenPair], make: Callable[[list[ReferenceTokens]], ReferenceTokens]
) -> TokenPair:
    """`make` done to the conditional and to the unconditional tokens; a pair that it leaves alone comes back itself.

    Unconditional rows that are all the same, as of the black image, are one row: it stands for every picture.
    """
    conditional = make([pair.conditional for pair in pairs])
    unconditional = distinct(make([_row_by_row(pair) for pair in pairs]))
    for pair in pairs:  # the same object, so that its keys and values need not be made again
        if conditional is pair.conditional and unconditional is pair.unconditional:
            return pair
    return TokenPair(conditional, unconditional)


def _row_by_row(pair: TokenPair) -> ReferenceTokens:
    """The unconditional tokens, one row for each conditional one."""
    rows, tokens = len(pair.conditional), pair.unconditional
    if len(tokens) == rows:
        return tokens
    return ReferenceTokens.of(tokens.expand(rows, -1, -1), tokens.provenance)
