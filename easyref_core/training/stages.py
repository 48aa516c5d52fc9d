"""The three training stages as data: trained parameters and starting point."""

from __future__ import annotations

import dataclasses

# Parameter groups, by name prefixes of their tensors in easyref_core's modules.
GROUPS: dict[str, tuple[str, ...]] = {
    "last_layer": ("aggregator.layers.", "aggregator.norm."),
    "reference_tokens": ("aggregator.reference_tokens.",),
    "projector": ("aggregator.projector.",),
    "kv": ("kv.",),
    # all other layers of the MLLM, and its vision tower, or the LoRA that is trained in their place
    "body": ("encoder.", "mllm_lora."),
    "lora": ("unet.",),
}

ADAPTERS = frozenset({"last_layer", "reference_tokens", "projector", "kv"})


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the progressive training."""

    name: str
    trains: frozenset[str]  # names of GROUPS
    starts_from: str | None  # previous stage; None: base MLLM and UNet

    @property
    def body_frozen(self) -> bool:
        """True if the MLLM's body runs without gradients; checkpoints then leave its weights out."""
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
    """Parameter group of a tensor."""
    return next(group for group, prefixes in GROUPS.items() if name.startswith(prefixes))
