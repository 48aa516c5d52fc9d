"""Aggregation: the learned reference tokens, appended to the context, gather what the references have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu

from ..mllm.qwen2_vl import DecoderLayer, text_rope

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from ..mllm.context import ContextStates, Provenance


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
        count = self.config.num_tokens
        tokens = self.reference_tokens(torch.arange(count, device=context.device)).to(context.dtype)
        x = torch.cat([context, tokens.expand(len(context), -1, -1)], dim=1)
        if real is not None:
            real = torch.cat([real, real.new_ones(len(real), count)], dim=1)
        turn = text_rope(x.shape[1], self.config, x.device)
        for layer in self.layers[:-1]:
            x = layer(x, turn, causal=self.config.causal, padding_mask=real, attn_bias=bias)
        # Of the last layer only the reference tokens' rows are used, so only those are computed.
        last = self.layers[-1]
        options = {"causal": self.config.causal, "padding_mask": real, "attn_bias": bias}
        return self.norm(last(x, turn, num_queries=count, **options))

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) -> reference tokens (B, T, C)."""
        first, _, second, norm = self.projector
        return norm(second(gelu(first(hidden))))
