"""What a guider is doing, told to the patches: the sigma of the step, and which rows of the batch are unconditional.

Whether a row is conditional is told by whose conditioning it is, not by its place in the batch: guiders order their
conditionings differently (CFG, PerpNeg, DualCFG, dual models), leave some out, and split batches.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FIRST_SIGMA = 999999999.9  # what the host's percent_to_sigma gives for 0 %

# Keys in transformer_options.
ROLES = "easyref_roles"  # for each index of cond_or_uncond, is it unconditional?
SIGMA = "easyref_sigma"  # this step's sigma, read back from the device outside the UNet


def read_sigma(sigmas: Tensor | None) -> float:
    """The sigma of a step, all rows of a batch being at the same one; the start, if nobody says."""
    return FIRST_SIGMA if sigmas is None else float(sigmas.max())


def unconditional_runs(options: dict[str, Any]) -> tuple[bool, ...]:
    """For each run of equal length that the batch is made of: is it unconditional?

    Without word from a guider the host's convention holds: index 0 is positive.
    """
    indices = options.get("cond_or_uncond") or [0]
    roles = {index: role for index, role in enumerate(options.get(ROLES, ())) if role is not None}
    return tuple(roles.get(index, index != 0) for index in indices)


def is_unconditional(name: str) -> bool:
    """Guiders name their conditionings: positive, negative, middle (a second prompt), empty_negative_prompt, null, ..."""
    return any(word in name.lower() for word in ("neg", "uncond", "empty", "null"))


_predicting: ContextVar[dict[Any, bool] | None] = ContextVar("easyref_predicting", default=None)


def name_conditionings(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PREDICT_NOISE wrapper: remember, while this guider predicts, which of its conditionings are unconditional."""
    # By uuid, and as the guider was given them: guiders and nodes pass on copies of the lists, and to a list the host
    # may have appended copies of the other side's conditionings, uuid and all, for their areas.
    given = executor.class_obj.original_conds
    roles = {cond["uuid"]: is_unconditional(name) for name in given for cond in given[name] if "uuid" in cond}
    token = _predicting.set(roles)
    try:
        return executor(*args, **kwargs)
    finally:
        _predicting.reset(token)


def announce_step(
    executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """CALC_COND_BATCH wrapper: say the sigma, and for each index of cond_or_uncond whether it is unconditional."""
    options = {**model_options.get("transformer_options", {}), SIGMA: read_sigma(timestep)}
    predicting = _predicting.get()
    if predicting is not None:
        options[ROLES] = tuple(predicting.get(cond[0].get("uuid")) if cond else None for cond in conds)
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})
