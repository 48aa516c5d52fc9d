"""Groups of images that share some attributes and vary the others, and their prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .images import ATTRIBUTES, COUNTS, NAMES, caption, held_out

MAX_SHARED, MAX_NAMED = 3, 2  # attributes that a group shares, that a prompt names
OUTSIDER_RATE = 0.2  # probability that one reference does not belong
OUTSIDER_FROM = 4  # references of a group that may have an outsider


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes of a group, before it is rendered."""

    references: NDArray[np.integer]  # (K, 5)
    target: NDArray[np.integer]  # (5,)
    shared: tuple[str, ...]  # attributes common to the target and all references but the outsider
    named: tuple[str, ...]  # attributes that the prompt names; the references vary in them
    outsider: int | None  # index of the reference that shares nothing

    @property
    def prompt(self) -> str:
        return caption(self.target, self.named)

    def values(self, names: tuple[str, ...]) -> dict[str, str]:
        """{attribute: the target's value} of some attributes."""
        return {name: ATTRIBUTES[name][self.target[NAMES.index(name)]] for name in names}


def plan_group(
    rng: np.random.Generator,
    references: int,
    target_held_out: bool = False,
    min_named: int = 0,
    outsider: bool | None = None,
) -> Plan:
    """Draw the attributes of a group.

    Args:
        references: number of references.
        target_held_out: draw a target whose triple is held out; otherwise no image of the group has one.
        min_named: minimum number of attributes in the prompt.
        outsider: whether one reference does not belong; None draws it at the rate of training.
    """
    if outsider is None:
        outsider = references >= OUTSIDER_FROM and rng.random() < OUTSIDER_RATE
    while True:
        order = rng.permutation(len(NAMES))
        shared = order[: rng.integers(1, MAX_SHARED + 1)]
        named = order[len(shared) :][: rng.integers(min_named, MAX_NAMED + 1)]
        target = np.array([rng.integers(n) for n in COUNTS])
        images = np.stack([spread(rng, n, references) for n in COUNTS], axis=1)  # -> (K, 5)
        images[:, shared] = target[shared]
        odd = int(rng.integers(references)) if outsider else None
        if odd is not None:
            others = [(target[i] + rng.integers(1, COUNTS[i])) % COUNTS[i] for i in shared]
            images[odd, shared] = others
        if held_out(target) if target_held_out else not (held_out(target) or held_out(images).any()):
            names = tuple(NAMES[i] for i in sorted(shared)), tuple(NAMES[i] for i in sorted(named))
            return Plan(images, target, *names, odd)


def spread(rng: np.random.Generator, values: int, count: int) -> NDArray[np.integer]:
    """Draw `count` of `values` values as evenly as possible, in random order."""
    return rng.permutation(rounds(rng, values, count))


def rounds(rng: np.random.Generator, values: int, count: int) -> NDArray[np.integer]:
    """Draw `count` of `values` values, of which none repeats before all have occurred."""
    return np.concatenate([rng.permutation(values) for _ in range(-(-count // values))])[:count]


def evaluation_groups(
    seed: int, count: int, target_held_out: bool = True, sizes: tuple[int, ...] = (2, 3, 4, 5, 6)
) -> Iterator[Plan]:
    """Groups for evaluation: the prompts are not empty, sizes alternate, outsiders are as in training."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield plan_group(rng, sizes[i % len(sizes)], target_held_out, min_named=1)
