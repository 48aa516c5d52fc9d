"""The MLLM body; forward is for training, inference runs its parts through prefill.CachedGroupEncoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .qwen2_vl import DecoderLayer, VisionTower, text_rope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, dtype

    from .config import EasyRefConfig
    from .qwen2_vl import LayerKVCache


class GroupEncoder(nn.Module):
    """All layers of the MLLM but the last: patches and ids in, context states (B, S, D) out."""

    def __init__(self, config: EasyRefConfig, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config, operations, **factory)
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(config.body_layers)
        )
        # The MLLM's final norm stays, although its last layer is cut off: the authors replaced
        # `multimodal_llm.norm` by Identity, which has no effect on `multimodal_llm.model.norm`.
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)

    def forward(
        self,
        patches: Tensor,
        grid: Tensor,
        input_ids: Tensor,
        image_token: int,
        dtype: dtype,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """patches (sum, 1176), grid (K, 3), input_ids (B, S) -> context states (B, S, D) in `dtype`.

        A batch of groups has all its images in `patches` and `grid`, group by group. Shorter groups are
        padded on the left, because RoPE depends only on differences of positions. padding_mask: (B, S).
        """
        features = self.visual(patches.to(dtype), grid)
        x = self.embed(input_ids, image_token, features, dtype)
        return self.prefill(x, padding_mask=padding_mask)

    def embed(self, input_ids: Tensor, image_token: int, features: Tensor, dtype: dtype) -> Tensor:
        """Token embeddings (B, S, D), with the features (n, D) in place of the image tokens."""
        x = self.embed_tokens(input_ids).to(dtype)
        return x.masked_scatter((input_ids == image_token)[..., None], features.to(x))

    def prefill(
        self,
        x: Tensor,
        caches: Sequence[LayerKVCache] | None = None,
        after_block: Callable[[], None] = lambda: None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, n, D) -> context states (B, n, D), continuing after `caches` (one per layer).

        after_block: called after each layer; may raise to stop.
        """
        start = caches[0].length if caches else 0
        rope = text_rope(x.shape[1], self.config, x.device, start)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, rope, padding_mask=padding_mask, cache=cache)
            after_block()
        return self.norm(x)
