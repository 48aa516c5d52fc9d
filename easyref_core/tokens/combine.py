"""Several sets of reference tokens made into one: joined, averaged, added, subtracted, or faded from one to another.

Every set (B, T, C) comes with a weight, 1 where nothing else is said. Token t of one group and token t of another come
from the same learned token, so they are comparable. What there is nothing to compute for comes back as the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch

from ..utils.errors import MAX_FACTOR, shorten
from .reference_tokens import Provenance, ReferenceTokens

if TYPE_CHECKING:
    from torch import Tensor

# Sets of tokens (B, T, C) in order, each with its weight.
Weighted = Sequence[tuple["Tensor", float]]


def concat(sets: Weighted) -> Tensor:
    """All tokens side by side, (B, sum of T, C): the UNet attends to every group's own."""
    scaled = [scale(*one) for one in sets]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)


def add(sets: Weighted) -> Tensor:
    """The sum of weight * tokens."""
    return reduce(torch.add, [scale(*one) for one in sets])


def average(sets: Weighted) -> Tensor:
    """The weighted mean; of equal sets exactly that set. Vectors that differ give shorter ones."""
    first, _ = sets[0]
    if len(sets) == 1:
        return first
    return first + add([(tokens - first, weight) for tokens, weight in sets[1:]]) / sum(w for _, w in sets)


def norm_average(sets: Weighted) -> Tensor:
    """The mean's direction with the mean of the lengths, vector by vector: no token gets weaker by averaging.

    IPAdapter_plus's "norm average" is another thing: it divides each element by its norm across the images.
    """
    if len(sets) == 1:
        return sets[0][0]
    mean, length = average(sets), average([(norms(tokens), weight) for tokens, weight in sets])
    found = norms(mean)
    return torch.where(found > 0, mean * (length / found), mean)  # opposite vectors leave no direction


def subtract(sets: Weighted) -> Tensor:
    """The first set, times its weight, less the weighted mean of the others."""
    first, rest = scale(*sets[0]), [one for one in sets[1:] if one[1]]
    return first - average(rest) if rest else first


def interpolate(sets: Weighted, factor: float) -> Tensor:
    """On the straight line from the first set to the second: factor 0 is the first, 1 the second."""
    first = scale(*sets[0])
    if len(sets) == 1 or factor == 0:
        return first
    last = scale(*sets[1])
    return last if factor == 1 else torch.lerp(first, last, factor)


def scale(tokens: Tensor, weight: float) -> Tensor:
    """weight * tokens, which are keys and values alike; at weight 1 the tokens themselves."""
    return tokens if weight == 1 else tokens * weight


def norms(tokens: Tensor) -> Tensor:
    """Length of every token, (B, T, 1)."""
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)


METHODS: dict[str, Callable[..., Tensor]] = {
    "concat": concat,
    "average": average,
    "norm average": norm_average,
    "add": add,
    "subtract": subtract,
    "interpolate": interpolate,
}
BY_PLACE = ("subtract", "interpolate")  # in which the first set has a part of its own


def combine(
    tokens: Sequence[ReferenceTokens],
    method: str = "concat",
    weights: Sequence[float] | None = None,
    factor: float = 0.5,
) -> ReferenceTokens:
    """One set of reference tokens (B, T, C) from several of one checkpoint, in order.

    method: one of METHODS. weights: one for each set, 1 by default; 0 leaves a set out (in "subtract" and
    "interpolate" it keeps its place). factor: of "interpolate" between two sets, 0 to 1.
    One set with weight 1 comes back as it is. A set of one row goes with every row of a batch.
    Raises ValueError for sets of different checkpoints or sizes, and for weights that leave nothing.
    """
    if method not in METHODS:
        raise ValueError(
            f"There is no way to combine called {method!r}; wanted one of: {', '.join(METHODS)}."
        )
    require_one_checkpoint(tokens)
    weights = _checked_weights(weights, tokens, method)
    sets = [(t, w) for t, w in zip(tokens, weights, strict=True) if w or method in BY_PLACE]
    compute, how = METHODS[method], f"{method} of {len(tokens)}"
    if any(weight != 1 for weight in weights):
        how += f", weights {', '.join(f'{weight:g}' for weight in weights)}"
    if method == "interpolate":
        compute, how = partial(interpolate, factor=_checked_factor(factor, tokens)), f"{how} at {factor:g}"
    values = compute(_rows_alike(sets, method))
    unchanged = next((one for one in tokens if values is one), None)
    if unchanged is not None:
        return unchanged
    return ReferenceTokens.of(values, Provenance.combined([t.provenance for t in tokens], how))


def require_one_checkpoint(tokens: Sequence[ReferenceTokens]) -> None:
    """Refuse an empty list, tokens that do not say what made them, and tokens of different checkpoints."""
    if not tokens:
        raise ValueError("There are no reference tokens to combine. Give at least one set.")
    for number, one in enumerate(tokens, 1):
        if not isinstance(one, ReferenceTokens):
            raise TypeError(
                f"Set {number} is a {type(one).__name__}; wanted ReferenceTokens, as EasyRef.aggregate makes "
                "them."
            )
    made_by = [one.provenance.checkpoint for one in tokens]
    if len(set(made_by)) > 1:
        other = next(i for i, checkpoint in enumerate(made_by) if checkpoint != made_by[0])
        raise ValueError(
            f"Set 1 and set {other + 1} of the reference tokens were made by different EasyRef checkpoints "
            f"({made_by[0]} and {made_by[other]}); their numbers do not compare. Encode all groups with one "
            "checkpoint."
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
    if not all(0 <= weight <= MAX_FACTOR for weight in weights):  # NaN is in no range
        raise ValueError(
            f"The weights are {shorten(weights)}; wanted numbers from 0 to {MAX_FACTOR}. To take away, use "
            "subtract."
        )
    if not any(weights):
        raise ValueError(f"All weights are 0: {method} has nothing left. Give at least one set a weight.")
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


def _rows_alike(sets: Weighted, method: str) -> Weighted:
    """The sets with as many rows each; a single row is repeated (a view)."""
    rows = max(len(tokens) for tokens, _ in sets)
    for tokens, _ in sets:
        if len(tokens) not in (1, rows):
            raise ValueError(
                f"The sets of reference tokens have {' and '.join(str(len(t)) for t, _ in sets)} rows; "
                f"wanted 1 or {rows} each. Combine batches of as many groups or frames."
            )
    if method != "concat":
        require_as_many_tokens([tokens for tokens, _ in sets], method)
    return [(t if len(t) == rows else t.expand(rows, -1, -1), weight) for t, weight in sets]


def require_as_many_tokens(sets: Sequence[Tensor], purpose: str) -> None:
    """Refuse sets (B, T, C) of different T."""
    counts = [tokens.shape[1] for tokens in sets]
    if len(set(counts)) > 1:
        raise ValueError(
            f"The sets have {', '.join(map(str, counts))} reference tokens; {purpose} needs as many in each. "
            "Sets that were joined by concat only go with sets joined from as many."
        )
