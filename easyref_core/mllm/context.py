"""Records that encoding returns: context states, their provenance, and per-reference weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_REFERENCE_WEIGHT = 4


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Provenance of context states or tokens; they are only valid for the checkpoint that produced them.

    Token files store these fields under these names.
    """

    checkpoint: str  # fingerprint, see Checkpoint.fingerprint
    instruction: str
    prompt: str
    references: int  # number of images in the group
    size: int  # nominal size of the images in pixels
    how: str = ""  # the operation, unless a group was encoded: "black image", "average of 2"
    parts: tuple[Provenance, ...] = ()  # inputs of the operation, in order

    @classmethod
    def combined(cls, parts: Sequence[Provenance], how: str) -> Provenance:
        """Provenance of an operation on several tokens; different prompts are joined by " | "."""

        def joined(texts: Iterable[str]) -> str:
            return " | ".join(dict.fromkeys(text for text in texts if text))

        return cls(
            parts[0].checkpoint,
            joined(part.instruction for part in parts),
            joined(part.prompt for part in parts),
            references=sum(part.references for part in parts),
            size=max(part.size for part in parts),
            how=how,
            parts=tuple(parts),
        )


@dataclasses.dataclass(frozen=True)
class ContextStates:
    """Output of the MLLM body for one group."""

    states: Tensor  # (1, S, D)
    provenance: Provenance
    grid: Tensor  # (K, 3): frames, rows, columns of each reference in patches
    spans: tuple[tuple[int, int], ...]  # start and end (exclusive) of each reference's image tokens in S
    weights: tuple[float, ...] | None = None  # of each reference in the aggregation; None: all 1

    def weighed(self, weights: Sequence[float]) -> ContextStates:
        """Return the same context with a weight for each reference.

        In the attention of the reference tokens, exp(logit) of a reference's image tokens is multiplied by
        its weight: 0 removes the reference, 1 leaves it as it is, w counts it as w copies.
        Raises ValueError unless there is one weight for each reference, each from 0 to 4.
        """
        if len(weights) != len(self.spans):
            raise ValueError(
                f"{len(weights)} weights for {len(self.spans)} references. Give one for each, in their order."
            )
        for i, weight in enumerate(weights):
            if not 0 <= weight <= MAX_REFERENCE_WEIGHT:  # False for NaN too
                raise ValueError(
                    f"The weight of reference {i + 1} is {weight:g}; wanted 0 (ignored) to "
                    f"{MAX_REFERENCE_WEIGHT} (1 leaves it as it is)."
                )
        neutral = all(weight == 1 for weight in weights)
        return dataclasses.replace(self, weights=None if neutral else tuple(map(float, weights)))
