"""State of the guider: the sigma of a step, the side of each conditioning, the number of each latent.

A conditioning belongs to the conditional or the unconditional side by its name in the guider, not by its
place in the batch: guiders order their conditionings differently (CFG, PerpNeg, DualCFG, dual models), leave
some out, and split batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .sub_batch import sampled_frames

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


def frames_of(options: dict[str, Any], latents: int) -> tuple[int, ...]:
    """Number of each latent of a UNet call in the whole batch or animation.

    AnimateDiff and ComfyUI's context windows sample some frames at a time and say which; the sampling itself
    may be of a part of a batch (sub_batch.py).
    """
    sampled = sampled_frames()
    for chosen in ((options.get("ad_params") or {}).get("sub_idxs"), _window(options.get("context_window"))):
        if chosen is not None and len(chosen) == latents:
            return tuple(sampled[index] if index < len(sampled) else int(index) for index in map(int, chosen))
    return sampled if len(sampled) == latents else tuple(range(latents))


def _window(window: Any) -> list[int] | None:
    """Frames of one of ComfyUI's context windows: those it is for, after the one before them if that is
    added.
    """
    indices, anchor = getattr(window, "index_list", None), getattr(window, "causal_anchor_index", None)
    return indices if indices is None or anchor is None or anchor < 0 else [anchor, *indices]


def is_unconditional(name: str) -> bool:
    """Guiders name their conditionings: positive, negative, middle (a second prompt), empty_negative_prompt,
    null, ...
    """
    return any(word in name.lower() for word in ("neg", "uncond", "empty", "null"))


_predicting: ContextVar[dict[Any, bool] | None] = ContextVar("easyref_predicting", default=None)


def record_cond_roles(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PREDICT_NOISE wrapper: remember, while this guider predicts, which of its conditionings are
    unconditional.
    """
    # By uuid, and as the guider was given them: guiders and nodes pass on copies of the lists, and to a list
    # the host may have appended copies of the other side's conditionings, uuid and all, for their areas.
    given = executor.class_obj.original_conds
    roles = {cond["uuid"]: is_unconditional(name) for name in given for cond in given[name] if "uuid" in cond}
    token = _predicting.set(roles)
    try:
        return executor(*args, **kwargs)
    finally:
        _predicting.reset(token)


def named_roles(conds: Sequence[Sequence[dict[str, Any]] | None]) -> tuple[bool | None, ...]:
    """For each list of conditionings of a step: is it unconditional? None where the guider does not say."""
    predicting = _predicting.get() or {}
    return tuple(predicting.get(cond[0].get("uuid")) if cond else None for cond in conds)
