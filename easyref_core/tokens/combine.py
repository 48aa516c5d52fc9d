"""Combine several sets of reference tokens into one: join, average, add, subtract, or interpolate.

Each set (B, T, C) has a weight, 1 by default. Token t of each group comes from the same learned token, so the
tokens of several groups are comparable. Where nothing has to be computed, the result is the input object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch

from ..mllm.context import Provenance
from ..utils.errors import MAX_FACTOR, shorten
from .reference_tokens import ReferenceTokens

if TYPE_CHECKING:
    from torch import Tensor

# Sets of tokens (B, T, C) in order, each with its weight.
Weighted = Sequence[tuple["Tensor", float]]


def concat(sets: Weighted) -> Tensor:
    """All tokens, (B, sum of T, C), so that the UNet attends to those of each group."""
    weighted = [scale(*pair) for pair in sets]
    return weighted[0] if len(weighted) == 1 else torch.cat(weighted, dim=1)


def add(sets: Weighted) -> Tensor:
    """The sum of weight * tokens."""
    return reduce(torch.add, [scale(*pair) for pair in sets])


def average(sets: Weighted) -> Tensor:
    """The weighted mean; for equal sets exactly that set. Averaging different vectors reduces their norm."""
    first, _ = sets[0]
    if len(sets) == 1:
        return first
    return first + add([(tokens - first, weight) for tokens, weight in sets[1:]]) / sum(w for _, w in sets)


def norm_average(sets: Weighted) -> Tensor:
    """The direction of the mean with the mean of the lengths, token by token, so averaging weakens no token.

    IPAdapter_plus's "norm average" is another method: it divides each element by its norm across the images.
    """
    if len(sets) == 1:
        return sets[0][0]
    mean, length = average(sets), average([(norms(tokens), weight) for tokens, weight in sets])
    mean_norm = norms(mean)
    return torch.where(mean_norm > 0, mean * (length / mean_norm), mean)  # the mean of opposite vectors is 0


def subtract(sets: Weighted) -> Tensor:
    """The first set, times its weight, minus the weighted mean of the others."""
    first, rest = scale(*sets[0]), [pair for pair in sets[1:] if pair[1]]
    return first - average(rest) if rest else first


def interpolate(sets: Weighted, factor: float) -> Tensor:
    """Linear interpolation from the first set (factor 0) to the second (factor 1)."""
    first = scale(*sets[0])
    if len(sets) == 1 or factor == 0:
        return first
    last = scale(*sets[1])
    return last if factor == 1 else torch.lerp(first, last, factor)


def scale(tokens: Tensor, weight: float) -> Tensor:
    """weight * tokens, which scales keys and values alike; at weight 1 the same object."""
    return tokens if weight == 1 else tokens * weight


def norms(tokens: Tensor) -> Tensor:
    """Length of each token, (B, T, 1)."""
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)


METHODS: dict[str, Callable[..., Tensor]] = {
    "concat": concat,
    "average": average,
    "norm average": norm_average,
    "add": add,
    "subtract": subtract,
    "interpolate": interpolate,
}
POSITIONAL_METHODS = ("subtract", "interpolate")  # the position of a set decides its role


def combine(
    tokens: Sequence[ReferenceTokens],
    method: str = "concat",
    weights: Sequence[float] | None = None,
    factor: float = 0.5,
) -> ReferenceTokens:
    """Combine sets of reference tokens (B, T, C) of one checkpoint into one set.

    method: one of METHODS. weights: one for each set, 1 by default; 0 leaves a set out (in "subtract" and
    "interpolate" it keeps its position). factor: of "interpolate" between two sets, 0 to 1.
    One set with weight 1 is returned as it is. A set of one row is used for each row of a batch.
    Raises ValueError for sets of different checkpoints or sizes, and for weights that are all 0.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is not a way to combine; wanted one of: {', '.join(METHODS)}.")
    require_one_checkpoint(tokens)
    weights = _checked_weights(weights, tokens, method)
    sets = [(t, w) for t, w in zip(tokens, weights, strict=True) if w or method in POSITIONAL_METHODS]
    compute, operation = METHODS[method], f"{method} of {len(tokens)}"
    if any(weight != 1 for weight in weights):
        operation += f", weights {', '.join(f'{weight:g}' for weight in weights)}"
    if method == "interpolate":
        compute = partial(interpolate, factor=_checked_factor(factor, tokens))
        operation += f" at {factor:g}"
    values = compute(_with_equal_rows(sets, method))
    unchanged = next((t for t in tokens if values is t), None)
    if unchanged is not None:
        return unchanged
    return ReferenceTokens.of(values, Provenance.combined([t.provenance for t in tokens], operation))


def require_one_checkpoint(tokens: Sequence[ReferenceTokens]) -> None:
    """Raises an error for an empty list, for plain tensors, and for tokens of different checkpoints."""
    if not tokens:
        raise ValueError("The list of reference tokens to combine is empty. Give at least one set.")
    for number, one in enumerate(tokens, 1):
        if not isinstance(one, ReferenceTokens):
            raise TypeError(
                f"Set {number} is a {type(one).__name__}; wanted ReferenceTokens, as EasyRef.aggregate "
                "returns them."
            )
    checkpoints = [one.provenance.checkpoint for one in tokens]
    if len(set(checkpoints)) > 1:
        other = next(i for i, checkpoint in enumerate(checkpoints) if checkpoint != checkpoints[0])
        raise ValueError(
            f"Set 1 and set {other + 1} of the reference tokens are of different EasyRef checkpoints "
            f"({checkpoints[0]} and {checkpoints[other]}); tokens of different checkpoints are incompatible. "
            "Encode all groups with one checkpoint."
        )


def require_equal_counts(sets: Sequence[Tensor], purpose: str) -> None:
    """Raises ValueError for sets (B, T, C) of different T."""
    counts = [tokens.shape[1] for tokens in sets]
    if len(set(counts)) > 1:
        raise ValueError(
            f"The sets have {', '.join(map(str, counts))} reference tokens; {purpose} needs as many in each. "
            "Sets joined by concat can only be combined with sets of equal token count."
        )


def _checked_weights(
    weights: Sequence[float] | None, tokens: Sequence[ReferenceTokens], method: str
) -> list[float]:
    weights = [1.0] * len(tokens) if weights is None else list(weights)
    if len(weights) != len(tokens):
        raise ValueError(
            f"There are {len(weights)} weights for {len(tokens)} sets of reference tokens; wanted one for "
            "each."
        )
    if not all(0 <= weight <= MAX_FACTOR for weight in weights):  # False for NaN too
        raise ValueError(
            f"The weights are {shorten(weights)}; wanted numbers from 0 to {MAX_FACTOR}. To take away, use "
            "subtract."
        )
    if not any(weights):
        raise ValueError(f"All weights are 0, so {method} has no set. Give at least one set a weight.")
    return weights


def _checked_factor(factor: float, tokens: Sequence[ReferenceTokens]) -> float:
    if len(tokens) > 2:
        raise ValueError(
            f"interpolate goes from one set of reference tokens to a second; there are {len(tokens)}. "
            "Remove the others, or use average with weights."
        )
    if not 0 <= factor <= 1:
        raise ValueError(
            f"The factor of interpolate is {factor:g}; wanted 0 (the first set) to 1 (the second)."
        )
    return factor


def _with_equal_rows(sets: Weighted, method: str) -> Weighted:
    """The sets with equal numbers of rows: a single row is repeated (a view)."""
    rows = max(len(tokens) for tokens, _ in sets)
    for tokens, _ in sets:
        if len(tokens) not in (1, rows):
            raise ValueError(
                f"The sets of reference tokens have {' and '.join(str(len(t)) for t, _ in sets)} rows; "
                f"wanted 1 or {rows} each. Combine batches of as many groups or frames."
            )
    if method != "concat":
        require_equal_counts([tokens for tokens, _ in sets], method)
    return [(t if len(t) == rows else t.expand(rows, -1, -1), weight) for t, weight in sets]
