"""The three stages as data: what each trains and what it starts from; what it reads is the run's `data`."""

from __future__ import annotations

import dataclasses

# What can be trained, by the names of its tensors (the names of easyref_core's modules).
GROUPS: dict[str, tuple[str, ...]] = {
    "last_layer": ("aggregator.layers.", "aggregator.norm."),
    "reference_tokens": ("aggregator.reference_tokens.",),
    "projector": ("aggregator.projector.",),
    "kv": ("kv.",),
    "body": ("encoder.",),  # all other layers of the MLLM, and its vision tower
    "lora": ("unet.",),
}

ADAPTERS = frozenset({"last_layer", "reference_tokens", "projector", "kv"})


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the progressive training."""

    name: str
    trains: frozenset[str]  # of GROUPS
    starts_from: str | None  # the stage before; None: the base MLLM and the UNet

    @property
    def body_frozen(self) -> bool:
        """The MLLM's body then runs without gradients, and its weights are left out of what is saved."""
        return "body" not in self.trains


STAGES = {
    stage.name: stage
    for stage in (
        Stage("alignment", ADAPTERS, starts_from=None),
        Stage("single_reference", ADAPTERS | {"body", "lora"}, starts_from="alignment"),
        Stage("multi_reference", ADAPTERS | {"body", "lora"}, starts_from="single_reference"),
    )
}


def group_of(name: str) -> str:
    """The group a tensor belongs to."""
    return next(group for group, prefixes in GROUPS.items() if name.startswith(prefixes))
