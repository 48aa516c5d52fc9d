"""EasyRef, with and without its aggregation: three ways from references to tokens with one checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mllm.instructions import INSTRUCTION
from ...mllm.preprocess import SIZE
from ...model import EasyRef, load
from ...training.trainable import AGGREGATIONS
from ...unet import diffusers_unet
from .method import Method, Task


@dataclasses.dataclass(eq=False)
class EasyRefMethod(Method):
    """Reference tokens from the MLLM, which the UNet attends to.

    aggregation: "easyref" encodes the group together; "average" and "concatenation" (the paper's Table 5)
    encode each reference alone with the same prompt, and average or concatenate their tokens.
    tokens, final_layers: expected sizes of the checkpoint (the paper's Table 4: number of tokens, and
    insertion layer counted from the last), so that an entry with the wrong file is refused.
    """

    kind = "easyref"
    condition_remedy = (
        "Set the method's dtype to float32 or bfloat16, or check its checkpoint and references."
    )

    checkpoint: str
    mllm: str | None = None
    aggregation: str = "easyref"
    weight: float = 1.0
    lora_strength: float = 1.0
    size: int = SIZE
    instruction: str = INSTRUCTION
    tokens: int | None = None
    final_layers: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"The aggregation is {self.aggregation!r}; wanted one of {', '.join(AGGREGATIONS)}."
            )
        dtype = getattr(torch, self.dtype)
        self.model = load(self.checkpoint, self.mllm, device=self.base.device, dtype=dtype)
        config = self.model.config
        for name, size in (("tokens", config.num_tokens), ("final_layers", config.final_layers)):
            expected = getattr(self, name)
            if expected is not None and expected != size:
                raise ValueError(
                    f"{self.checkpoint} has {name} {size}, the config entry says {expected}. Name the "
                    f"checkpoint that was trained with {name} {expected}, or correct the entry."
                )

    @property
    def settings(self) -> dict[str, Any]:
        settings = super().settings | {"checkpoint": self.model.fingerprint}
        settings |= {"tokens": self.model.config.num_tokens, "final_layers": self.model.config.final_layers}
        del settings["mllm"]  # part of the checkpoint's fingerprint
        return settings

    def batch_key(self, task: Task) -> Hashable:
        return len(task.references) if self.aggregation == "concatenation" else None

    def prepare(self, task: Task, folder: Path) -> Tensor:
        return reference_tokens(self.model, task, self.aggregation, self.instruction, self.size)

    @contextmanager
    def attach(self, conditions: Sequence[Tensor], seeds: int) -> Iterator[None]:
        tokens = torch.cat(list(conditions))
        uncond = self.model.unconditional(self.instruction, self.size).as_subclass(torch.Tensor)
        # Both halves need rows of one length. Attention to k copies of the same tokens is attention to one
        # copy.
        copies = tokens.shape[1] // uncond.shape[1]
        attachment = diffusers_unet.apply(
            self.base.unet,
            self.model,
            tokens,
            uncond.repeat(len(tokens), copies, 1),
            weight=self.weight,
            lora_strength=self.lora_strength,
        )
        try:
            yield
        finally:
            attachment.remove()


def reference_tokens(model: EasyRef, task: Task, aggregation: str, instruction: str, size: int) -> Tensor:
    """Tokens of a group: (1, T, C), or (1, K T, C) for "concatenation"."""

    def tokens(references: Sequence) -> Tensor:
        # Without a cache, a task's tokens do not depend on the tasks before it, to the last bit.
        model.group_encoder.caches.clear()
        context = model.encode(references, task.prompt, instruction, size)
        return model.aggregate(context).as_subclass(torch.Tensor)

    if aggregation == "easyref":
        return tokens(task.references)
    each = torch.cat([tokens([reference]) for reference in task.references])  # -> (K, T, C)
    return each.mean(dim=0, keepdim=True) if aggregation == "average" else each.flatten(0, 1)[None]
