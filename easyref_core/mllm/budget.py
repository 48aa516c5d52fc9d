"""What encoding a group will take, known before it is encoded: tokens, memory and operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .prefix_cache import MAX_MASK_ENTRIES, VISION_CHUNK_PATCHES
from .preprocess import resized_sides

if TYPE_CHECKING:
    from .config import EasyRefConfig

SMALLEST = 2  # image tokens along a side, see preprocess
# Bytes that a device's allocator keeps of what was freed, in pieces that do not fit what comes next. On a CPU 1 to 8
# references took up to 101 MiB more than their tensors are counted here (docs/performance.md).
ALLOCATOR_SLACK_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Budget:
    """One group at one size. Tokens are of the MLLM's context, memory is in bytes."""

    size: int  # pixels, as asked for
    sides: tuple[tuple[int, int], ...]  # each reference as it is read: width, height in pixels
    tokens: tuple[int, ...]  # image tokens of each reference
    text_tokens: int  # instruction, prompt, chat, and the two marks around each reference
    limit: int  # tokens that fit beside the reference tokens
    activation_bytes: int  # beside the weights
    flops: int  # of the encoding, a multiplication and an addition counted as two

    @property
    def total(self) -> int:
        """Tokens of the context."""
        return sum(self.tokens) + self.text_tokens

    def fits(self, memory: int | None = None) -> bool:
        """Whether the context holds the group, and `memory` bytes, where given, the activations."""
        return self.total <= self.limit and (memory is None or self.activation_bytes <= memory)


def budget(
    config: EasyRefConfig, pictures: Sequence[tuple[int, int]], text_tokens: int, size: int, itemsize: int
) -> Budget:
    """What a group takes at a size. pictures: width, height of each reference; itemsize: bytes of the arithmetic's type."""
    sides = tuple(resized_sides(height, width, config, size)[-1][::-1] for width, height in pictures)
    patches = [width * height // config.patch_size**2 for width, height in sides]
    tokens = tuple(count // config.merge_size**2 for count in patches)
    total = sum(tokens) + text_tokens
    return Budget(
        size,
        sides,
        tokens,
        text_tokens,
        config.max_positions - config.num_tokens,
        activation_bytes(config, patches, total + config.num_tokens, itemsize),
        flops(config, patches, total),
    )


def largest_size(
    config: EasyRefConfig,
    pictures: Sequence[tuple[int, int]],
    text_tokens: int,
    size: int,
    itemsize: int,
    memory: int | None = None,
) -> int | None:
    """The largest size in whole image tokens, at most `size`, at which a group fits; None where none does."""
    unit = config.pixels_per_token
    candidates = (size, *range((size - 1) // unit * unit, SMALLEST * unit - 1, -unit))
    return next(
        (s for s in candidates if budget(config, pictures, text_tokens, s, itemsize).fits(memory)), None
    )


def activation_bytes(
    config: EasyRefConfig, patches: Sequence[int], tokens: int, itemsize: int, before: int = 0
) -> int:
    """Upper bound of the memory one encoding works in, beside the weights; grows by as much with each reference.

    patches: of each reference for the vision tower; tokens: that the decoder reads, `before`: after so many that it has
    read already. Counted: the widest moment of a vision block (QKV, their rotated float32 copies, both sides of the
    MLP), which sees a piece of the group at a time, or of a decoder layer, with the keys and values of all layers,
    whichever is larger; the image tokens and the embeddings; and ALLOCATOR_SLACK_BYTES.
    """
    c = config
    piece = min(sum(patches), max(VISION_CHUNK_PATCHES, *patches)) if patches else 0
    vision = piece * (
        c.vision_width * (6 * itemsize + 16) + 3 * c.vision_mlp_width * itemsize + 4 * c.patch_values
    )
    decoder = tokens * (c.hidden_size * (8 * itemsize + 16) + 3 * c.intermediate_size * itemsize)
    keys_values = 2 * c.kv_heads * c.head_dim * itemsize
    decoder += (tokens + before) * c.body_layers * keys_values
    if before:  # of one layer, for all heads; and the mask
        decoder += before * 2 * c.hidden_size * itemsize + min(
            MAX_MASK_ENTRIES, tokens * (before + tokens)
        ) * (1 + itemsize)
    seen = max(tokens, sum(patches) // c.merge_size**2)
    return max(vision, decoder) + (seen + tokens) * c.hidden_size * itemsize + ALLOCATOR_SLACK_BYTES


def flops(config: EasyRefConfig, patches: Sequence[int], tokens: int, before: int = 0) -> int:
    """Multiplications and additions of one encoding. patches: of each reference; tokens: of the context.

    before: tokens of the context that were read already, whose keys and values the others attend to.
    Counted: every matrix product of the vision tower and the MLLM body, attention as it is computed (the whole square
    of the context in each layer, of a reference in each vision block). Not counted: norms, activations, rotations.
    """
    c = config
    vision_block = c.vision_width * (4 * c.vision_width + 2 * c.vision_mlp_width)
    merged = c.vision_width * c.merge_size**2
    merger = merged * (merged + c.hidden_size) // c.merge_size**2  # for each patch
    vision = sum(patches) * (c.patch_values * c.vision_width + c.vision_depth * vision_block + merger)
    vision += c.vision_depth * 2 * c.vision_width * sum(n * n for n in patches)
    kv_width = c.kv_heads * c.head_dim
    layer = c.hidden_size * (2 * c.hidden_size + 2 * kv_width + 3 * c.intermediate_size)
    body = c.body_layers * (tokens * layer + 2 * c.hidden_size * tokens * (before + tokens))
    return 2 * (vision + body)
