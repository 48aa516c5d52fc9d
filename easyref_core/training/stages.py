"""The three stages as data: what each trains, what it reads, and what it starts from."""

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
    multi_reference: (
        bool  # groups with one picture held out as target, instead of a picture as its own reference
    )
    starts_from: str | None  # the stage before; None: the base MLLM and the UNet

    @property
    def body_frozen(self) -> bool:
        """The MLLM's body then runs without gradients, and its weights are left out of what is saved."""
        return "body" not in self.trains


STAGES = {
    stage.name: stage
    for stage in (
        Stage("alignment", ADAPTERS, multi_reference=False, starts_from=None),
        Stage(
            "single_reference", ADAPTERS | {"body", "lora"}, multi_reference=False, starts_from="alignment"
        ),
        Stage(
            "multi_reference",
            ADAPTERS | {"body", "lora"},
            multi_reference=True,
            starts_from="single_reference",
        ),
    )
}


def group_of(name: str) -> str:
    """The group a tensor belongs to."""
    return next(group for group, prefixes in GROUPS.items() if name.startswith(prefixes))
