"""A recorder for every reference term of a MODEL, emptied whenever a sampling begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from ...easyref_core.inspect.reference_share import Recorder
from .condition import attach
from .step_wrapper import KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

RECORD_KEY = "easyref_record"


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What EASYREF_RECORD carries: one recorder for each Apply node of the chain, in order."""

    recorders: tuple[Recorder, ...]


def with_record(model: ModelPatcher) -> tuple[ModelPatcher, Record]:
    """A clone whose reference terms are recorded while it samples, and the record; `model` stays as it is.

    The pictures stay as they are too. Raises ValueError where there is no reference term.
    """
    attached = model.get_attachment(KEY)
    if attached is None or not attached.injections:
        raise ValueError(
            "The MODEL has no reference term to record. Put Apply EasyRef before this node, with a weight "
            "that is not 0 and a start before its end."
        )
    record = Record(tuple(Recorder() for _ in attached.injections))
    pairs = zip(attached.injections, record.recorders, strict=True)
    patched = model.clone()
    recorded = tuple(injection.recorded_by(recorder) for injection, recorder in pairs)
    attach(patched, dataclasses.replace(attached, injections=recorded))
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, RECORD_KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORD_KEY, ClearOnSample(record))
    return patched, record


class ClearOnSample:
    """Wrapper of a sampling: two samplings must not be one record."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for recorder in self.record.recorders:
            recorder.clear()
        return executor(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> ClearOnSample:
        return self
