"""The modules of an EasyRef model under the names of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..mllm.group_encoder import GroupEncoder
from ..tokens.aggregator import ReferenceAggregator
from ..unet.reference_attention import KVProjections

if TYPE_CHECKING:
    from ..mllm.config import EasyRefConfig


class CheckpointModules(nn.Module):
    """All modules with weights. Tensors are named after them: encoder.*, aggregator.*, kv.*."""

    def __init__(
        self, config: EasyRefConfig, inner: Sequence[int], operations: Any = nn, **factory: Any
    ) -> None:
        """inner: width of the attention at each cross-attention site."""
        super().__init__()
        self.encoder = GroupEncoder(config, operations, **factory)
        self.aggregator = ReferenceAggregator(config, operations, **factory)
        self.kv = KVProjections(inner, config.token_width, operations, **factory)
