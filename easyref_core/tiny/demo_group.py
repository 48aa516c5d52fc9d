"""Numbered example groups of the tiny model, and a description of what each shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .groups import Plan, plan_group
from .images import render


def demo_group(number: int, references: int, outsider: bool) -> tuple[Plan, NDArray[np.uint8]]:
    """The attributes of an example, whose target is held out, and its references (K, 64, 64, 3)."""
    rng = np.random.default_rng([number, references, outsider])
    plan = plan_group(rng, references, target_held_out=True, min_named=1, outsider=outsider)
    return plan, render(plan.references, rng)


def in_common(plan: Plan) -> str:
    """Describe what the references share, such as "colour red, texture striped"."""
    values = plan.values(plan.shared)
    words = ", ".join(f"{name} {value}" for name, value in values.items())
    if plan.outsider is None:
        return words
    return f"{words} (but for reference {plan.outsider + 1}, which does not belong)"
