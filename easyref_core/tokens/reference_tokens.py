"""Reference tokens and context states, with the provenance of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_WEIGHT = 4  # of one reference


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What made a context or tokens: they are worth something only to the checkpoint that made them."""

    checkpoint: str  # fingerprint of the checkpoint (checkpoint.fingerprint)
    instruction: str
    prompt: str
    references: int  # how many images the group held
    size: int  # the images' nominal size in pixels (preprocess.SIZE)
    how: str = ""  # where it is not a group's own: "black image", "average of 2"
    parts: tuple[Provenance, ...] = ()  # what made the tokens it was combined from, in order

    @classmethod
    def combined(cls, parts: Sequence[Provenance], how: str) -> Provenance:
        """What made tokens that were computed from others; different prompts stand side by side."""

        def joined(texts: Iterable[str]) -> str:
            return " | ".join(dict.fromkeys(text for text in texts if text))

        return cls(
            parts[0].checkpoint,
            joined(part.instruction for part in parts),
            joined(part.prompt for part in parts),
            sum(part.references for part in parts),
            max(part.size for part in parts),
            how=how,
            parts=tuple(parts),
        )


@dataclasses.dataclass(frozen=True)
class ContextStates:
    """Output of the MLLM body for one group: states (1, S, D), what made them, and where the references are in them."""

    states: Tensor
    provenance: Provenance
    grid: Tensor  # (K, 3): frames, rows, columns of each reference in patches
    # each reference's image tokens: first place in S, and the one after the last
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] | None = (
        None  # how much each reference counts in the aggregation; None: all alike
    )

    def weighed(self, weights: Sequence[float]) -> ContextStates:
        """The same context with a weight for each reference: 1 as it is, 0 not read, w as if there were w of it.

        In the attention of the reference tokens, exp(logit) of a reference's image tokens is multiplied by its weight.
        Raises ValueError where the weights are not one for each reference, each from 0 to 4.
        """
        if len(weights) != len(self.spans):
            raise ValueError(
                f"{len(weights)} weights for {len(self.spans)} references. Give one for each, in their order."
            )
        for i, weight in enumerate(weights):
            if not 0 <= weight <= LARGEST_WEIGHT:  # False for NaN too
                raise ValueError(
                    f"The weight of reference {i + 1} is {weight:g}; wanted 0 (not read) to "
                    f"{LARGEST_WEIGHT}, 1 as it is."
                )
        neutral = all(weight == 1 for weight in weights)
        return dataclasses.replace(self, weights=None if neutral else tuple(map(float, weights)))


class ReferenceTokens(torch.Tensor):
    """Reference tokens (B, T, C) with their provenance; operations on them return plain tensors.

    B is 1 for one group; a batch has one row for each image or frame, see frames.py.
    """

    provenance: Provenance
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, values: Tensor, provenance: Provenance) -> ReferenceTokens:
        """Reference tokens that share memory with `values`."""
        tokens = values.as_subclass(cls)
        tokens.provenance = provenance
        return tokens

    def __deepcopy__(self, memo: dict) -> ReferenceTokens:
        # torch's own raises RuntimeError, because new_empty() of this class returns a plain tensor
        return self.of(self.detach().clone(), self.provenance)
