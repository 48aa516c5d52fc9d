"""What a guider is doing, told to the patches: the sigma of the step, and of the rows of the batch which are
unconditional, which frames they are, and which part of the latent.

Whether a row is conditional is told by whose conditioning it is, not by its place in the batch: guiders order their
conditionings differently (CFG, PerpNeg, DualCFG, dual models), leave some out, and split batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ..easyref_core.masks import Crop, whole

if TYPE_CHECKING:
    from torch import Tensor

FIRST_SIGMA = 999999999.9  # what the host's percent_to_sigma gives for 0 %

# Keys in transformer_options.
ROLES = "easyref_roles"  # for each index of cond_or_uncond, is it unconditional?
SIGMA = "easyref_sigma"  # this step's sigma, read back from the device outside the UNet
AREAS = (
    "easyref_areas"  # by uuid of a conditioning that has an area: the crop of the latent its UNet call sees
)


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


def area_crop(area: Sequence[int], latent: tuple[int, int]) -> Crop:
    """area: the host's (height, width, top, left), in latent pixels; as there, what reaches over the edge is cut off."""
    dimensions = len(area) // 2  # more than two for video: height and width are the last
    (height, width), (top, left) = area[dimensions - 2 : dimensions], area[-2:]
    return Crop(latent, top, left, min(latent[0] - top, height), min(latent[1] - left, width))


def crops_of_runs(options: dict[str, Any], height: int, width: int, runs: int) -> tuple[Crop, ...]:
    """For each run of the batch: which part of the latent it is. The whole, of height x width, where nobody says."""
    areas, everything = options.get(AREAS, {}), whole(height, width)
    crops = [areas.get(uuid, everything) for uuid in options.get("uuids") or ()]
    fit = len(crops) == runs and all((crop.height, crop.width) == (height, width) for crop in crops)
    return tuple(crops) if fit else (everything,) * runs


def frames_of(options: dict[str, Any], latents: int) -> tuple[int, ...]:
    """The number of each latent of a run in the whole batch: AnimateDiff and the host's context windows sample some at a
    time, and say which."""
    window = options.get("context_window")
    for chosen in ((options.get("ad_params") or {}).get("sub_idxs"), getattr(window, "index_list", None)):
        if chosen is not None and len(chosen) == latents:
            return tuple(int(frame) for frame in chosen)
    return tuple(range(latents))


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
    """CALC_COND_BATCH wrapper: say the sigma, the areas, and for each index of cond_or_uncond whether it is unconditional."""
    options = {**model_options.get("transformer_options", {}), SIGMA: read_sigma(timestep)}
    options[AREAS] = {
        cond["uuid"]: area_crop(cond["area"], tuple(x_in.shape[-2:]))
        for side in conds
        for cond in side or ()
        if "uuid" in cond and cond.get("area") is not None
    }
    predicting = _predicting.get()
    if predicting is not None:
        options[ROLES] = tuple(predicting.get(cond[0].get("uuid")) if cond else None for cond in conds)
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})
