"""One row of reference tokens for each picture of a batch or frame of an animation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .combine import require_as_many_tokens, require_one_checkpoint
from .reference_tokens import Provenance, ReferenceTokens

if TYPE_CHECKING:
    from torch import Tensor

# How far a fade is, 0 to 1, after which part of its time, 0 to 1.
EASINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda part: part,
    "ease in": lambda part: part**2,
    "ease out": lambda part: 1 - (1 - part) ** 2,
    "ease in-out": lambda part: part**2 * (3 - 2 * part),
}


def batch(tokens: Sequence[ReferenceTokens]) -> ReferenceTokens:
    """All rows of the sets, in order: sets (B, T, C) -> (sum of B, T, C). One set comes back as it is.

    Raises ValueError for sets of different checkpoints and for different numbers of tokens.
    """
    rows = _rows(tokens, "a batch")
    if len(tokens) == 1:
        return tokens[0]
    return ReferenceTokens.of(rows, _made(tokens, f"batch of {len(rows)}"))


def over_frames(tokens: Sequence[ReferenceTokens], frames: int, easing: str = "linear") -> ReferenceTokens:
    """A cross-fade through all rows of the sets: -> (frames, T, C).

    The rows lie evenly over the frames, the first on the first frame, the last on the last; a row whose frame is a
    whole number is that frame, bit for bit. easing: one of EASINGS, of every fade from one row to the next.
    Raises ValueError as `batch` does, for an unknown easing, and for fewer frames than rows.
    """
    if easing not in EASINGS:
        raise ValueError(f"There is no easing called {easing!r}; wanted one of: {', '.join(EASINGS)}.")
    rows = _rows(tokens, "a cross-fade")
    if frames < len(rows):
        raise ValueError(
            f"{frames} frames are too few for {len(rows)} sets of reference tokens; wanted at least one "
            "frame for each."
        )
    made = _made(tokens, f"{frames} frames through {len(rows)}, {easing}")
    return ReferenceTokens.of(fade(rows, frames, EASINGS[easing]), made)


def fade(rows: Tensor, frames: int, ease: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows (N, T, C) -> (frames, T, C), each frame on the straight line between the two rows next to it."""
    if len(rows) == 1:
        return rows.repeat(frames, 1, 1)
    # In whole numbers, so that the frames on which a row lies are exact.
    places = [divmod(frame * (len(rows) - 1), frames - 1) for frame in range(frames)]
    before = torch.tensor([min(row, len(rows) - 2) for row, _ in places])
    part = torch.tensor([1.0 if row > len(rows) - 2 else rest / (frames - 1) for row, rest in places])
    return torch.lerp(rows[before], rows[before + 1], ease(part).to(rows)[:, None, None])


def distinct(tokens: ReferenceTokens) -> ReferenceTokens:
    """Where all rows are the same, one row (1, T, C), which stands for any number of them; otherwise the tokens."""
    if len(tokens) == 1 or not torch.equal(tokens, tokens[:1].expand(len(tokens), -1, -1)):
        return tokens
    return ReferenceTokens.of(tokens[:1].clone(), tokens.provenance)


def _rows(tokens: Sequence[ReferenceTokens], purpose: str) -> Tensor:
    require_one_checkpoint(tokens)
    require_as_many_tokens(tokens, purpose)
    return torch.cat(list(tokens))


def _made(tokens: Sequence[ReferenceTokens], how: str) -> Provenance:
    return Provenance.combined([one.provenance for one in tokens], how)
