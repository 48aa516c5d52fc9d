"""Records that encoding returns: context states, their provenance, and per-reference weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..utils.area_mean import grid_means

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
    masks: tuple[Tensor, ...] | None = None  # weights of each reference's image tokens, (rows, columns)

    @property
    def token_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each reference in image tokens, which merge squares of patches."""
        grids = []
        for (rows, columns), (start, end) in zip(self.grid[:, 1:].tolist(), self.spans, strict=True):
            merged = math.isqrt(rows * columns // (end - start))
            grids.append((rows // merged, columns // merged))
        return grids

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

    def masked(self, masks: Sequence[Tensor | None]) -> ContextStates:
        """Return the same context in which only the marked part of each reference counts.

        In the attention of the reference tokens, exp(logit) of an image token is multiplied by the mean of
        the mask over its area: 0 removes the token, 1 leaves it as it is. The layers before this attention
        have encoded whole images, so the remaining tokens still carry some of what is outside the mask.

        masks: (height, width) of any size, stretched over its reference, with values that are clamped to
        0..1; None leaves a reference whole.
        Raises ValueError unless there is one mask for each reference, and for values that are not finite.
        """
        if len(masks) != len(self.spans):
            raise ValueError(
                f"{len(masks)} masks for {len(self.spans)} references. Give one for each, in their order."
            )
        weights = tuple(
            torch.ones(grid) if mask is None else _token_weights(mask, grid, f"The mask of reference {i + 1}")
            for i, (mask, grid) in enumerate(zip(masks, self.token_grids, strict=True))
        )
        neutral = all(bool((weight == 1).all()) for weight in weights)
        return dataclasses.replace(self, masks=None if neutral else weights)


def _token_weights(mask: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """Mean of a mask (height, width) over each image token, (rows, columns), float32 on the CPU."""
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; wanted (height, width).")
    values = mask.detach().cpu().double()
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} has values that are NaN or infinite; wanted 0 (ignored) to 1.")
    return grid_means(values[None].clamp(0, 1), grid)[0].float()
