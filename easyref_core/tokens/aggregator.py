"""The aggregator: learned reference tokens attend to the context states of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu

from ..mllm.qwen2_vl import DecoderLayer, text_rope

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from ..mllm.context import ContextStates
    from ..mllm.qwen2_vl import Rope


def weight_bias(context: ContextStates, num_tokens: int) -> Tensor | None:
    """Bias of the reference tokens' attention logits: log of each key's weight, (T, S + T) float32.

    An image token has the weight of its reference times that of the reference's mask. None where every weight
    is 1.
    """
    if context.weights is None and context.masks is None:
        return None
    factor = torch.ones(context.states.shape[1] + num_tokens)
    for i, (start, end) in enumerate(context.spans):
        if context.weights is not None:
            factor[start:end] = context.weights[i]
        if context.masks is not None:
            factor[start:end] *= context.masks[i].flatten()
    return factor.log().expand(num_tokens, -1)


class ReferenceAggregator(nn.Module):
    """Context states (B, S, D) -> reference tokens (B, T, C): the MLLM's final layer(s) and the projector."""

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

    def forward(
        self, context: Tensor, padding_mask: Tensor | None = None, attn_bias: Tensor | None = None
    ) -> Tensor:
        """Context states (B, S, D) -> reference tokens (B, T, C); arguments as for `gather`."""
        return self.project(self.gather(context, padding_mask, attn_bias))

    def gather(
        self, context: Tensor, padding_mask: Tensor | None = None, attn_bias: Tensor | None = None
    ) -> Tensor:
        """Context states (B, S, D) -> hidden states at the reference tokens (B, T, D).

        padding_mask: (B, S), False at padding, which is on the left. attn_bias: (T, S + T), see weight_bias;
        it applies to the reference tokens' rows, so the context's rows do not depend on it.

        The attention is causal in the released model: the authors set is_causal = False, but transformers
        4.45.2 never reads that flag under sdpa. Positions continue after the context; they do not start again
        at 0.
        """
        count, causal = self.config.num_tokens, self.config.causal
        if padding_mask is not None:
            padding_mask = torch.cat([padding_mask, padding_mask.new_ones(len(padding_mask), count)], dim=1)
        x, rope = self.last_layer_input(context, padding_mask, attn_bias)
        # Only the reference tokens' rows of the last layer are used, so only those are computed.
        last = self.layers[-1]
        return self.norm(
            last(x, rope, causal=causal, num_queries=count, padding_mask=padding_mask, attn_bias=attn_bias)
        )

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
            x = layer(x, rope, causal=self.config.causal, padding_mask=padding_mask, attn_bias=attn_bias)
        return x, rope

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) -> reference tokens (B, T, C)."""
        first, _, second, norm = self.projector
        return norm(second(gelu(first(hidden))))
