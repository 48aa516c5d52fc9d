"""EasyRef, and EasyRef without its aggregation: one checkpoint, three ways from references to tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from easyref_core import INSTRUCTION, SIZE, load
from easyref_core.training.trainable import AGGREGATIONS
from easyref_core.unet import diffusers_unet

from .method import Method, Task

if TYPE_CHECKING:
    from torch import Tensor

    from easyref_core import EasyRef
    from easyref_core.training.base_model import BaseModel


class EasyRefMethod(Method):
    """References, through the MLLM, as tokens that the UNet attends to.

    aggregation: "easyref" reads the group together; "average" and "concatenation" (the paper's Table 5) read every
    reference alone, with the same prompt, and average their tokens or lay them side by side.
    tokens, final_layers: what the checkpoint must have (the paper's Table 4: number of tokens, insertion layer counted
    from the last), so that an entry that names the wrong file is refused.
    """

    def __init__(
        self,
        base: BaseModel,
        checkpoint: str,
        mllm: str | None = None,
        aggregation: str = "easyref",
        weight: float = 1.0,
        lora_strength: float = 1.0,
        size: int = SIZE,
        instruction: str = INSTRUCTION,
        tokens: int | None = None,
        final_layers: int | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(base)
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"The aggregation is {aggregation!r}; wanted one of {', '.join(AGGREGATIONS)}.")
        self.model = load(checkpoint, mllm, device=base.device, dtype=getattr(torch, dtype))
        for name, wanted, found in (
            ("tokens", tokens, self.model.config.num_tokens),
            ("final_layers", final_layers, self.model.config.final_layers),
        ):
            if wanted is not None and wanted != found:
                raise ValueError(
                    f"{checkpoint} has {name} {found}, the config entry says {wanted}. Name the checkpoint that was "
                    f"trained with {name} {wanted}, or correct the entry."
                )
        self.aggregation, self.weight, self.lora_strength = aggregation, weight, lora_strength
        self.size, self.instruction, self.dtype = size, instruction, dtype

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "kind": "easyref",
            "checkpoint": self.model.fingerprint,
            "aggregation": self.aggregation,
            "weight": self.weight,
            "lora_strength": self.lora_strength,
            "size": self.size,
            "instruction": self.instruction,
            "tokens": self.model.config.num_tokens,
            "final_layers": self.model.config.final_layers,
            "dtype": self.dtype,
        }

    def together(self, task: Task) -> Hashable:
        return len(task.references) if self.aggregation == "concatenation" else None

    def prepare(self, task: Task, folder: Path) -> Tensor:
        return reference_tokens(self.model, task, self.aggregation, self.instruction, self.size)

    @contextmanager
    def attach(self, conditions: Sequence[Tensor], seeds: int) -> Iterator[None]:
        tokens = torch.cat(list(conditions))
        black = self.model.unconditional(self.instruction, self.size).as_subclass(torch.Tensor)
        # Both halves need rows of one length. Attention to k copies of the same tokens is attention to one copy.
        copies = tokens.shape[1] // black.shape[1]
        uncond = black.repeat(len(tokens), copies, 1)
        strengths = {"weight": self.weight, "lora_strength": self.lora_strength}
        attachment = diffusers_unet.apply(self.base.unet, self.model, tokens, uncond, **strengths)
        try:
            yield
        finally:
            attachment.remove()


def reference_tokens(model: EasyRef, task: Task, aggregation: str, instruction: str, size: int) -> Tensor:
    """Tokens of a group: (1, T, C), or (1, K T, C) by concatenation."""

    def tokens(references: Sequence) -> Tensor:
        model.group_encoder.caches.clear()  # to the last bit, a task's tokens do not depend on the tasks before it
        context = model.encode(references, task.prompt, instruction, size)
        return model.aggregate(context).as_subclass(torch.Tensor)

    if aggregation == "easyref":
        return tokens(task.references)
    each = torch.cat([tokens([reference]) for reference in task.references])  # -> (K, T, C)
    return each.mean(dim=0, keepdim=True) if aggregation == "average" else each.flatten(0, 1)[None]
