"""The MLLM body: a group of references and a text -> context states."""

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
    """All layers of the MLLM but the last: patches and ids in, context states (1, S, D) out."""

    def __init__(self, config: EasyRefConfig, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config, operations, **factory)
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(config.body_layers)
        )
        # The MLLM's own final norm stays, although its last layer is cut off: the authors replaced it by an identity
        # on the wrong object (multimodal_llm.norm instead of multimodal_llm.model.norm) and trained with it in place.
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)

    def forward(
        self,
        patches: Tensor,
        grid: Tensor,
        input_ids: Tensor,
        image_token: int,
        dtype: dtype,
        real: Tensor | None = None,
    ) -> Tensor:
        """patches (sum, 1176), grid (K, 3), input_ids (B, S) -> context states (B, S, D) in `dtype`.

        A batch of groups has all its images in `patches` and `grid`, group by group. Shorter groups are padded on the
        left, where `real` (B, S) is False: the positions of rotary embedding count only by their differences.
        """
        features = self.visual(patches.to(dtype), grid)
        return self.read(self.embed(input_ids, image_token, features, dtype), real=real)

    def embed(self, input_ids: Tensor, image_token: int, features: Tensor, dtype: dtype) -> Tensor:
        """What the decoder reads, (B, S, D): a token's embedding, or in place of an image token its feature (n, D)."""
        x = self.embed_tokens(input_ids).to(dtype)
        return x.masked_scatter((input_ids == image_token)[..., None], features.to(x))

    def read(
        self,
        x: Tensor,
        past: Sequence[LayerKVCache] | None = None,
        after_block: Callable[[], None] = lambda: None,
        real: Tensor | None = None,
    ) -> Tensor:
        """x (B, n, D) -> context states (B, n, D), read after what `past`, one for each layer, has read already.

        after_block: called after each layer; may raise to stop.
        """
        turn = text_rope(x.shape[1], self.config, x.device, past[0].length if past else 0)
        for number, layer in enumerate(self.layers):
            x = layer(x, turn, real=real, past=past[number] if past else None)
            after_block()
        return self.norm(x)
