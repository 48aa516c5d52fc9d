"""Types of the values that nodes pass to each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ...easyref_core.mllm.context import ContextStates
from .attach import CopyByReference

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ...easyref_core import ReferenceTokens
    from .hosted_model import HostedEasyRef

EasyRefModel = io.Custom("EASYREF_MODEL")  # hosted_model.HostedEasyRef
EasyRefGroupSocket = io.Custom("EASYREF_GROUP")  # images.ReferenceGroup, or a plain tuple of references
EasyRefContext = io.Custom("EASYREF_CONTEXT")  # HostedContext
EasyRefTokens = io.Custom("EASYREF_TOKENS")  # TokenPair
EasyRefRecordSocket = io.Custom("EASYREF_RECORD")  # recording.Record


class CarriesModel(CopyByReference):
    """Mixin of values that refer to the EasyRef model that made them, so that no wire needs to repeat it.

    The host looks for `patcher` and `get_models` in cached values: it protects models that the current prompt
    uses, and evicts values of earlier prompts that hold a model first. The weights are not copied. A pickled
    value has no model, because the host of this process manages the weights.
    """

    easyref: HostedEasyRef | None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "easyref": None}

    @property
    def patcher(self) -> ModelPatcher | None:
        return self.easyref.patcher if self.easyref else None

    def get_models(self) -> list[ModelPatcher]:
        return self.easyref.get_models() if self.easyref else []

    def model_or(self, connected: HostedEasyRef | None) -> HostedEasyRef:
        """The connected model, which takes precedence, or the one that this value carries."""
        model = connected or self.easyref
        if model is None:
            raise ValueError(
                "easyref is not connected, and a context or reference tokens from a file or another process "
                "do not contain their model. Connect Load EasyRef, with the checkpoint that made them, to "
                "easyref."
            )
        return model


@dataclasses.dataclass(frozen=True, eq=False)
class HostedContext(CarriesModel, ContextStates):
    """Context states of a group, with the model that encoded it."""

    easyref: HostedEasyRef | None = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPair(CarriesModel):
    """Reference tokens (B, T, C) of the conditional and of the unconditional side; one row is for all
    latents.

    easyref: the model that made them; None for tokens from a file or another process.
    """

    conditional: ReferenceTokens
    unconditional: ReferenceTokens
    easyref: HostedEasyRef | None = None
