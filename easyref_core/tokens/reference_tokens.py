"""Aggregation: the learned reference tokens, appended to the context, gather what the references have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu

from ..mllm.qwen2_vl import DecoderLayer, text_rope

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from ..mllm.qwen2_vl import Rope

LARGEST_WEIGHT = 4  # of one reference


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What made a context or tokens: they are worth something only to the checkpoint that made them."""

    checkpoint: str  # fingerprint of the checkpoint (checkpoint.fingerprint)
    instruction: str
    prompt: str
    references: int  # how many images the group held
    size: int  # the images' nominal size in pixels (preprocess.SIZE)
    how: str = ""  # where it is not a group's own: "black image", "average of 2"
    parts: tuple[Provenance, ...] = ()  # what made the tokens it was combined from, in order

    @classmethod
    def combined(cls, parts: Sequence[Provenance], how: str) -> Provenance:
        """What made tokens that were computed from others; different prompts stand side by side."""

        def joined(texts: Iterable[str]) -> str:
            return " | ".join(dict.fromkeys(text for text in texts if text))

        return cls(
            parts[0].checkpoint,
            joined(part.instruction for part in parts),
            joined(part.prompt for part in parts),
            sum(part.references for part in parts),
            max(part.size for part in parts),
            how=how,
            parts=tuple(parts),
        )


@dataclasses.dataclass(frozen=True)
class ContextStates:
    """Output of the MLLM body for one group: states (1, S, D), what made them, and where the references are in them."""

    states: Tensor
    provenance: Provenance
    grid: Tensor  # (K, 3): frames, rows, columns of each reference in patches
    # each reference's image tokens: first place in S, and the one after the last
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] | None = (
        None  # how much each reference counts in the aggregation; None: all alike
    )

    def weighed(self, weights: Sequence[float]) -> ContextStates:
        """The same context with a weight for each reference: 1 as it is, 0 not read, w as if there were w of it.

        In the attention of the reference tokens, exp(logit) of a reference's image tokens is multiplied by its weight.
        Raises ValueError where the weights are not one for each reference, each from 0 to 4.
        """
        if len(weights) != len(self.spans):
            raise ValueError(
                f"{len(weights)} weights for {len(self.spans)} references. Give one for each, in their order."
            )
        for i, weight in enumerate(weights):
            if not 0 <= weight <= LARGEST_WEIGHT:  # False for NaN too
                raise ValueError(
                    f"The weight of reference {i + 1} is {weight:g}; wanted 0 (not read) to {LARGEST_WEIGHT}, 1 as it is."
                )
        neutral = all(weight == 1 for weight in weights)
        return dataclasses.replace(self, weights=None if neutral else tuple(map(float, weights)))


def weight_bias(context: ContextStates, num_tokens: int) -> Tensor | None:
    """What is added to the attention logits of the reference tokens, (T, S + T) float32: log of each key's weight.

    None where every weight is 1.
    """
    if context.weights is None:
        return None
    factor = torch.ones(context.states.shape[1] + num_tokens)
    for (start, end), weight in zip(context.spans, context.weights, strict=True):
        factor[start:end] = weight
    return factor.log().expand(num_tokens, -1)


class ReferenceTokens(torch.Tensor):
    """Reference tokens (B, T, C) that remember what made them; what is computed from them is a plain tensor.

    B is 1 for one group; a batch has one row for each picture or frame (token_frames.py).
    """

    provenance: Provenance
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo: dict) -> ReferenceTokens:
        return self.of(self.detach().clone(), self.provenance)

    @classmethod
    def of(cls, values: Tensor, provenance: Provenance) -> ReferenceTokens:
        tokens = values.as_subclass(cls)
        tokens.provenance = provenance
        return tokens


class ReferenceAggregator(nn.Module):
    """Context states (1, S, D) -> reference tokens (1, T, C), through the MLLM's last layer and the projector."""

    def __init__(self, config: EasyRefConfig, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.config = config
        # An embedding read at every index is a parameter that a host can stream like any other weight.
        self.reference_tokens = operations.Embedding(config.num_tokens, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(config.final_layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
        self.projector = nn.ModuleList(
            [
                operations.Linear(config.hidden_size, config.projector_width, **factory),
                nn.Identity(),
                operations.Linear(config.projector_width, config.token_width, **factory),
                operations.LayerNorm(config.token_width, **factory),
            ]
        )

    def forward(self, context: Tensor, real: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return self.project(self.gather(context, real, bias))

    def gather(self, context: Tensor, real: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Context states (B, S, D) -> hidden states at the reference tokens (B, T, D).

        real: (B, S), False where a row is padded on the left. bias: (T, S + T), see weight_bias; it is for the
        reference tokens' own rows, so the context's are the same with and without it.

        The attention is causal in the released model: the authors set is_causal = False, but transformers 4.45.2
        never reads that flag under sdpa. Positions continue after the context; they do not start again at 0.
        """
        count, causal = self.config.num_tokens, self.config.causal
        if real is not None:
            real = torch.cat([real, real.new_ones(len(real), count)], dim=1)
        x, rope = self.last_layer_input(context, real, bias)
        # Of the last layer only the reference tokens' rows are used, so only those are computed.
        return self.norm(self.layers[-1](x, rope, causal=causal, queries=count, real=real, bias=bias))

    def last_layer_input(
        self, context: Tensor, padding_mask: Tensor | None = None, attn_bias: Tensor | None = None
    ) -> tuple[Tensor, Rope]:
        """Context states (B, S, D) -> input of the last layer (B, S + T, D) and the RoPE of its positions.

        padding_mask: (B, S + T). attn_bias: (T, S + T).
        """
        ids = torch.arange(self.config.num_tokens, device=context.device)
        tokens = self.reference_tokens(ids).to(context.dtype)
        x = torch.cat([context, tokens.expand(len(context), -1, -1)], dim=1)
        rope = text_rope(x.shape[1], self.config, x.device)
        for layer in self.layers[:-1]:
            x = layer(x, rope, causal=self.config.causal, real=padding_mask, bias=attn_bias)
        return x, rope

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) -> reference tokens (B, T, C)."""
        first, _, second, norm = self.projector
        return norm(second(gelu(first(hidden))))
