"""CheckpointModules: encoder, aggregator and K/V projections, whose state dict has the translated names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..mllm.group_encoder import GroupEncoder
from ..tokens.aggregator import ReferenceAggregator
from ..unet.reference_attention import KVProjections

if TYPE_CHECKING:
    from ..mllm.config import EasyRefConfig
    from ..unet.layout import Site


class CheckpointModules(nn.Module):
    """All modules with weights. Tensors are named after them: encoder.*, aggregator.*, kv.*."""

    def __init__(
        self, config: EasyRefConfig, widths: Mapping[Site, int], operations: Any = nn, **factory: Any
    ) -> None:
        """widths: of the attention at each cross-attention site, in processor order."""
        super().__init__()
        self.encoder = GroupEncoder(config, operations, **factory)
        self.aggregator = ReferenceAggregator(config, operations, **factory)
        self.kv = KVProjections(tuple(widths.values()), config.token_width, operations, **factory)
