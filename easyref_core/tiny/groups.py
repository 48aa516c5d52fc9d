"""Groups of pictures that share some attributes and vary the others, and prompts that name what the target shall have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .images import COUNTS, NAMES, caption, held_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_SHARED, MOST_NAMED = 3, 2  # attributes that a group shares, that a prompt names
# how often one reference does not belong, in groups of at least so many
OUTSIDER_RATE, OUTSIDER_FROM = (
    0.2,
    4,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A group before it is drawn: attributes of the references (K, 5) and of the target (5,)."""

    references: NDArray[np.integer]
    target: NDArray[np.integer]
    # what the references have in common, but for an outsider, and the target with them
    shared: tuple[str, ...]
    named: tuple[str, ...]  # what the prompt names; in it the references differ from one another
    outsider: int | None  # the reference that shares nothing

    @property
    def prompt(self) -> str:
        return caption(self.target, self.named)

    def values(self, names: tuple[str, ...]) -> dict[str, int]:
        """{attribute: the target's value} of some attributes."""
        return {name: int(self.target[NAMES.index(name)]) for name in names}


def plan_group(
    rng: np.random.Generator,
    references: int,
    target_held_out: bool = False,
    least_named: int = 0,
    outsider: bool | None = None,
) -> Plan:
    """Draw up a group of so many references.

    target_held_out: the target has a triple that no training sees; otherwise no picture has one. least_named: how many
    attributes the prompt names at least. outsider: one reference does not belong; None leaves it to chance, at the rates
    of training.
    """
    if outsider is None:
        outsider = references >= OUTSIDER_FROM and rng.random() < OUTSIDER_RATE
    while True:
        order = rng.permutation(len(NAMES))
        shared = order[: rng.integers(1, MOST_SHARED + 1)]
        named = order[len(shared) :][: rng.integers(least_named, MOST_NAMED + 1)]
        target = np.array([rng.integers(n) for n in COUNTS])
        pictures = np.stack([spread(rng, n, references) for n in COUNTS], axis=1)  # -> (K, 5)
        pictures[:, shared] = target[shared]
        odd = int(rng.integers(references)) if outsider else None
        if odd is not None:
            others = [(target[i] + rng.integers(1, COUNTS[i])) % COUNTS[i] for i in shared]
            pictures[odd, shared] = others
        if held_out(target) if target_held_out else not (held_out(target) or held_out(pictures).any()):
            names = tuple(NAMES[i] for i in sorted(shared)), tuple(NAMES[i] for i in sorted(named))
            return Plan(pictures, target, *names, odd)


def spread(rng: np.random.Generator, values: int, count: int) -> NDArray[np.integer]:
    """`count` of `values` values, spread as evenly as can be: no two alike before all have occurred."""
    rounds = [rng.permutation(values) for _ in range(-(-count // values))]
    return rng.permutation(np.concatenate(rounds)[:count])


def groups_to_judge(
    seed: int, count: int, target_held_out: bool = True, sizes: tuple[int, ...] = (2, 3, 4, 5, 6)
) -> Iterator[Plan]:
    """Groups to judge by, whose prompts name something; their sizes take turns, outsiders come as often as in training."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield plan_group(rng, sizes[i % len(sizes)], target_held_out, least_named=1)
