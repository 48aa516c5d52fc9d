"""Role of each conditioning of a guider: conditional or unconditional.

The role follows from the conditioning's name in the guider, not from its position in the batch: guiders order
their conditionings differently (CFG, PerpNeg, DualCFG, dual models), leave some out, and split batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROLES = "easyref_roles"  # in transformer_options: for each index of cond_or_uncond, True if unconditional

_roles: ContextVar[dict[Any, bool] | None] = ContextVar("easyref_roles", default=None)


def unconditional_runs(options: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each run of equal length that the batch consists of, True if it is unconditional.

    Where no guider published roles, the host's convention holds: index 0 is positive.
    """
    indices = options.get("cond_or_uncond") or [0]
    roles = {index: role for index, role in enumerate(options.get(ROLES, ())) if role is not None}
    return tuple(roles.get(index, index != 0) for index in indices)


def is_unconditional(name: str) -> bool:
    """True if this is a guider's name of an unconditional conditioning.

    Guiders use positive, negative, middle (a second prompt), empty_negative_prompt, null, ...
    """
    return any(word in name.lower() for word in ("neg", "uncond", "empty", "null"))


def record_cond_roles(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PREDICT_NOISE wrapper: record the roles of the guider's conditionings while it predicts."""
    # By uuid, and from the guider's original lists: guiders and nodes pass on copies of the lists, and for
    # areas the host may append copies of the other side's conditionings, uuid included.
    conds = executor.class_obj.original_conds
    roles = {cond["uuid"]: is_unconditional(name) for name in conds for cond in conds[name] if "uuid" in cond}
    token = _roles.set(roles)
    try:
        return executor(*args, **kwargs)
    finally:
        _roles.reset(token)


def recorded_roles(conds: Sequence[Sequence[Mapping[str, Any]] | None]) -> tuple[bool | None, ...]:
    """For each list of conditionings of a step, True if it is unconditional; None if no role is recorded."""
    roles = _roles.get() or {}
    return tuple(roles.get(cond[0].get("uuid")) if cond else None for cond in conds)
