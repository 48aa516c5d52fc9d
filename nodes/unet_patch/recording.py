"""Recorders of every reference term of a MODEL, cleared whenever a sampling begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from ...easyref_core.inspect.reference_share import Recorder
from ..host.attach import CopyByReference, attach
from .condition import attach_injections
from .step_wrapper import KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

RECORD_KEY = "easyref_record"


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Value of EASYREF_RECORD: one recorder for each Apply node of the chain, in order."""

    recorders: tuple[Recorder, ...]


def with_record(model: ModelPatcher) -> tuple[ModelPatcher, Record]:
    """A clone that records its reference terms while it samples, and the record; `model` is not modified.

    Sampled images do not change. Raises ValueError for a model without a reference term.
    """
    attachment = model.get_attachment(KEY)
    if attachment is None or not attachment.injections:
        raise ValueError(
            "The MODEL has no reference term to record. Put Apply EasyRef before this node, with a weight "
            "that is not 0 and a start before its end."
        )
    record = Record(tuple(Recorder() for _ in attachment.injections))
    pairs = zip(attachment.injections, record.recorders, strict=True)
    recorded = tuple(dataclasses.replace(injection, recorder=recorder) for injection, recorder in pairs)
    patched = model.clone()
    attach_injections(patched, dataclasses.replace(attachment, injections=recorded))
    attach(patched, RECORD_KEY, wrappers={WrappersMP.OUTER_SAMPLE: ClearOnSample(record)})
    return patched, record


class ClearOnSample(CopyByReference):
    """OUTER_SAMPLE wrapper: clears the record, because two samplings must not add up in it."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for recorder in self.record.recorders:
            recorder.clear()
        return executor(*args, **kwargs)
