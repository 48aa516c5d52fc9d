"""Batches of reference tokens: one row for each image of a batch or frame of an animation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..mllm.context import Provenance
from .combine import require_equal_counts, require_one_checkpoint
from .reference_tokens import ReferenceTokens

if TYPE_CHECKING:
    from torch import Tensor

# Progress of a fade, 0 to 1, at a fraction of its time, 0 to 1.
EASINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda time: time,
    "ease in": lambda time: time**2,
    "ease out": lambda time: 1 - (1 - time) ** 2,
    "ease in-out": lambda time: time**2 * (3 - 2 * time),
}


def batch(tokens: Sequence[ReferenceTokens]) -> ReferenceTokens:
    """All rows of the sets, in order: sets (B, T, C) -> (sum of B, T, C). One set is returned as it is.

    Raises ValueError for sets of different checkpoints or of different numbers of tokens.
    """
    rows = _rows(tokens, "a batch")
    if len(tokens) == 1:
        return tokens[0]
    return _combined(rows, tokens, f"batch of {len(rows)}")


def over_frames(tokens: Sequence[ReferenceTokens], frames: int, easing: str = "linear") -> ReferenceTokens:
    """A cross-fade through all rows of the sets, (frames, T, C).

    The rows are spread evenly over the frames, from the first frame to the last. A row whose position is an
    integer is that frame, bit for bit. easing: one of EASINGS, for each fade from one row to the next. Raises
    ValueError as `batch` does, for an unknown easing, and for fewer frames than rows.
    """
    if easing not in EASINGS:
        raise ValueError(f"{easing!r} is not an easing; wanted one of: {', '.join(EASINGS)}.")
    rows = _rows(tokens, "a cross-fade")
    if frames < len(rows):
        raise ValueError(
            f"{frames} frames are too few for {len(rows)} sets of reference tokens; wanted at least one "
            "frame for each."
        )
    operation = f"{frames} frames through {len(rows)}, {easing}"
    return _combined(fade(rows, frames, EASINGS[easing]), tokens, operation)


def fade(rows: Tensor, frames: int, ease: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows (N, T, C) -> (frames, T, C), each frame interpolated between its two neighbouring rows."""
    if len(rows) == 1:
        return rows.repeat(frames, 1, 1)
    # In integers, so that the frames at the position of a row are exact.
    positions = [divmod(frame * (len(rows) - 1), frames - 1) for frame in range(frames)]
    before = torch.tensor([min(row, len(rows) - 2) for row, _ in positions])
    time = torch.tensor([1.0 if row > len(rows) - 2 else rest / (frames - 1) for row, rest in positions])
    return torch.lerp(rows[before], rows[before + 1], ease(time).to(rows)[:, None, None])


def distinct(tokens: ReferenceTokens) -> ReferenceTokens:
    """One row (1, T, C) if all rows are equal, which applies to any number of images; else the tokens."""
    if len(tokens) == 1 or not torch.equal(tokens, tokens[:1].expand(len(tokens), -1, -1)):
        return tokens
    return ReferenceTokens.of(tokens[:1].clone(), tokens.provenance)


def _rows(tokens: Sequence[ReferenceTokens], purpose: str) -> Tensor:
    require_one_checkpoint(tokens)
    require_equal_counts(tokens, purpose)
    return torch.cat(list(tokens))


def _combined(values: Tensor, tokens: Sequence[ReferenceTokens], operation: str) -> ReferenceTokens:
    return ReferenceTokens.of(values, Provenance.combined([one.provenance for one in tokens], operation))
