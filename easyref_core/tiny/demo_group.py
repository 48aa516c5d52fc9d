"""Numbered example groups of the shapes, and a description of what each shares."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from .groups import Plan, plan_group, rounds
from .images import ATTRIBUTES, COUNTS, NAMES, render

MAX_REFERENCES = 6  # of a group in training
WORDS = frozenset(("a", "thing", "on", "at", "the")).union(*ATTRIBUTES.values())  # of captions


@dataclasses.dataclass(frozen=True)
class DemoGroup:
    """An example of a world: references, and what an image made from them should show."""

    references: NDArray[np.uint8]  # (K, 64, 64, 3)
    prompt: str
    shared: str  # what the references have in common, in words


def demo_plan(number: int, references: int, outsider: bool) -> Plan:
    """The attributes of an example, whose target is held out from training.

    More references extend the same group. The outsider is added at the end.
    """
    rng = np.random.default_rng(number)
    plan = plan_group(rng, MAX_REFERENCES, target_held_out=True, min_named=1, outsider=False)
    images = np.stack([rounds(rng, count, MAX_REFERENCES) for count in COUNTS], axis=1)
    shared = [NAMES.index(name) for name in plan.shared]
    images[:, shared] = plan.target[shared]
    images = images[:references]
    if not outsider:
        return dataclasses.replace(plan, references=images)
    rng = np.random.default_rng([number, MAX_REFERENCES])
    odd = (plan.target + [rng.integers(1, count) for count in COUNTS]) % COUNTS
    return dataclasses.replace(plan, references=np.vstack([images, odd]), outsider=references)


def demo_group(number: int, references: int, outsider: bool) -> DemoGroup:
    """The example of a number: `references` images that belong, then the outsider if `outsider`."""
    plan = demo_plan(number, references, outsider)
    images = [render(row[None], np.random.default_rng([number, i])) for i, row in enumerate(plan.references)]
    return DemoGroup(np.concatenate(images), plan.prompt, in_common(plan))


def in_common(plan: Plan) -> str:
    """Describe what the references share, such as "colour red, texture striped"."""
    values = plan.values(plan.shared)
    words = ", ".join(f"{name} {value}" for name, value in values.items())
    if plan.outsider is None:
        return words
    return f"{words} {outsider_note(plan.outsider)}"


def outsider_note(outsider: int) -> str:
    """Say which reference does not belong, by its index."""
    return f"(but for reference {outsider + 1}, which does not belong)"
