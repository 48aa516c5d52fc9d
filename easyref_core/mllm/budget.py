"""Memory limits of encoding, and estimates of the tokens, memory and flops that a group takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .preprocess import MIN_SIDE_TOKENS, resized_sides

if TYPE_CHECKING:
    import torch

    from .config import EasyRefConfig

# Bytes that a device's allocator holds in freed blocks of the wrong sizes. On a CPU, 1 to 8 references took
# up to 101 MiB more than their tensors are counted here (docs/performance.md).
ALLOCATOR_SLACK_BYTES = 128 * 2**20
VISION_CHUNK_PATCHES = 8192  # of one vision pass, about 14 images at 336 pixels; larger ones are not faster
MAX_MASK_ENTRIES = 2**24  # of an attention mask: queries times keys


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """Memory that encoding may use: the device and sizes of its caches, and the sizes of its chunks.

    At 336 pixels an image takes 0.3 MB of pixels, 0.9 MB of features and 8.5 MB of a prefix (float32). The
    default holds the released model's longest context in bfloat16, or 120 references in float32.
    """

    cache_device: torch.device | None = None  # None: the model's
    on_out_of_memory: Callable[[], None] = lambda: None  # frees memory before the retry
    pixel_cache_bytes: int = 64 * 2**20
    feature_cache_bytes: int = 256 * 2**20
    prefix_cache_bytes: int = 1024 * 2**20
    unconditional_cache_bytes: int = 8 * 2**20  # 16 sets of the released model's tokens
    vision_chunk_patches: int = VISION_CHUNK_PATCHES
    max_mask_entries: int = MAX_MASK_ENTRIES
    min_chunk_tokens: int = 64  # a decoder chunk of this size is not retried in smaller ones


@dataclasses.dataclass(frozen=True)
class Budget:
    """Estimate for one group at one size. Tokens are of the MLLM's context, memory is in bytes."""

    size: int  # nominal, in pixels
    sides: tuple[tuple[int, int], ...]  # width and height of each reference after resizing, in pixels
    tokens: tuple[int, ...]  # image tokens of each reference
    text_tokens: int  # instruction, prompt, chat template, and the two marks around each reference
    limit: int  # longest context that leaves room for the reference tokens
    activation_bytes: int  # beside the weights
    flops: int  # of the encoding; a multiplication and an addition count as two

    @property
    def total(self) -> int:
        """Tokens of the context."""
        return sum(self.tokens) + self.text_tokens

    def fits(self, memory: int | None = None) -> bool:
        """True if the context is short enough and the activations fit `memory` bytes (None: unlimited)."""
        return self.total <= self.limit and (memory is None or self.activation_bytes <= memory)


def budget(
    config: EasyRefConfig, image_sizes: Sequence[tuple[int, int]], text_tokens: int, size: int, itemsize: int
) -> Budget:
    """Estimate a group. image_sizes: (width, height) of each reference; itemsize: of the compute dtype."""
    sides = tuple(resized_sides(height, width, config, size)[-1][::-1] for width, height in image_sizes)
    patches = [width * height // config.patch_size**2 for width, height in sides]
    tokens = tuple(count // config.merge_size**2 for count in patches)
    total = sum(tokens) + text_tokens
    return Budget(
        size=size,
        sides=sides,
        tokens=tokens,
        text_tokens=text_tokens,
        limit=config.max_positions - config.num_tokens,
        activation_bytes=activation_bytes(config, patches, total + config.num_tokens, itemsize),
        flops=flops(config, patches, total),
    )


def largest_size(
    config: EasyRefConfig,
    image_sizes: Sequence[tuple[int, int]],
    text_tokens: int,
    size: int,
    itemsize: int,
    memory: int | None = None,
) -> int | None:
    """The largest size, at most `size`, at which a group fits; None if it fits at no size."""
    unit = config.pixels_per_token
    candidates = (size, *range((size - 1) // unit * unit, MIN_SIDE_TOKENS * unit - 1, -unit))
    return next(
        (s for s in candidates if budget(config, image_sizes, text_tokens, s, itemsize).fits(memory)), None
    )


def activation_bytes(
    config: EasyRefConfig, patches: Sequence[int], tokens: int, itemsize: int, cached_tokens: int = 0
) -> int:
    """Upper bound of the memory of one encoding beside the weights; it grows by as much with each reference.

    patches: of each reference that the vision tower encodes. tokens: that the decoder prefills after
    `cached_tokens`. Counted: the peak of a vision block (QKV, their rotated float32 copies, both sides of the
    MLP) for one chunk of images, or of a decoder layer with the KV caches of all layers, whichever is larger;
    the image tokens and the embeddings; and ALLOCATOR_SLACK_BYTES.
    """
    c = config
    chunk = min(sum(patches), max(VISION_CHUNK_PATCHES, *patches)) if patches else 0
    vision = chunk * (
        c.vision_width * (6 * itemsize + 16) + 3 * c.vision_mlp_width * itemsize + 4 * c.patch_values
    )
    decoder = tokens * (c.hidden_size * (8 * itemsize + 16) + 3 * c.intermediate_size * itemsize)
    key_values = 2 * c.kv_heads * c.head_dim * itemsize
    decoder += (tokens + cached_tokens) * c.body_layers * key_values
    if cached_tokens:  # keys and values of one layer, repeated for all heads; and the mask
        decoder += cached_tokens * 2 * c.hidden_size * itemsize
        decoder += min(MAX_MASK_ENTRIES, tokens * (cached_tokens + tokens)) * (1 + itemsize)
    features = max(tokens, sum(patches) // c.merge_size**2)
    return max(vision, decoder) + (features + tokens) * c.hidden_size * itemsize + ALLOCATOR_SLACK_BYTES


def flops(config: EasyRefConfig, patches: Sequence[int], tokens: int, cached_tokens: int = 0) -> int:
    """Flops of one encoding; arguments as for activation_bytes.

    Counted: every matrix product of the vision tower and the MLLM body, attention as it is computed (the full
    square of the context in each layer, of an image in each vision block), but not norms and activations.
    """
    c = config
    vision_block = c.vision_width * (4 * c.vision_width + 2 * c.vision_mlp_width)
    merged = c.vision_width * c.merge_size**2
    merger = merged * (merged + c.hidden_size) // c.merge_size**2  # per patch
    vision = sum(patches) * (c.patch_values * c.vision_width + c.vision_depth * vision_block + merger)
    vision += c.vision_depth * 2 * c.vision_width * sum(n * n for n in patches)
    kv_width = c.kv_heads * c.head_dim
    layer = c.hidden_size * (2 * c.hidden_size + 2 * kv_width + 3 * c.intermediate_size)
    body = c.body_layers * (tokens * layer + 2 * c.hidden_size * tokens * (cached_tokens + tokens))
    return 2 * (vision + body)
