"""Numbered example groups to show the tiny model with, and in words what each has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .groups import Plan, plan_group
from .images import ATTRIBUTES, render

if TYPE_CHECKING:
    from numpy.typing import NDArray


def demo_group(number: int, references: int, outsider: bool) -> tuple[Plan, NDArray[np.uint8]]:
    """The group of this number, always the same, its target held out from training; its references (K, 64, 64, 3)."""
    rng = np.random.default_rng([number, references, outsider])
    plan = plan_group(rng, references, target_held_out=True, least_named=1, outsider=outsider)
    return plan, render(plan.references, rng)


def in_common(plan: Plan) -> str:
    """What a group's references share, in words: "colour red, texture striped"."""
    values = plan.values(plan.shared)
    words = ", ".join(f"{name} {ATTRIBUTES[name][value]}" for name, value in values.items())
    if plan.outsider is None:
        return words
    return f"{words} (but for reference {plan.outsider + 1}, which does not belong)"
