"""Types of the values that nodes pass to each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from comfy_api.latest import io

if TYPE_CHECKING:
    from ...easyref_core import ReferenceTokens

EasyRefModel = io.Custom("EASYREF_MODEL")  # hosted_model.HostedEasyRef
EasyRefGroupSocket = io.Custom("EASYREF_GROUP")  # tuple of references in order, each (1, height, width, C)
EasyRefContext = io.Custom("EASYREF_CONTEXT")  # easyref_core.ContextStates
EasyRefTokens = io.Custom("EASYREF_TOKENS")  # TokenPair
EasyRefRecordSocket = io.Custom("EASYREF_RECORD")  # recording.Record


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPair:
    """Reference tokens (B, T, C) of the conditional and of the unconditional side; one row is for all
    latents.
    """

    conditional: ReferenceTokens
    unconditional: ReferenceTokens
