"""What a group will take, before it is read: image tokens, memory, operations, all counted from sizes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .preprocess import resized_sizes

if TYPE_CHECKING:
    from .config import EasyRefConfig

MARKS = 2  # tokens around the image tokens of each reference
TEXT = 64  # tokens of the chat template, the instruction and a prompt of ordinary length


@dataclasses.dataclass(frozen=True)
class Budget:
    """Of one group at one size. sizes: of the references as the MLLM sees them, (height, width) in pixels."""

    sizes: tuple[tuple[int, int], ...]
    image_tokens: tuple[int, ...]  # of each reference
    tokens: int  # of the whole context: references, their marks and the text
    limit: int  # most tokens that fit beside the reference tokens
    memory: int  # bytes that encoding works in, beside the weights: an upper bound
    operations: int  # multiplications and additions of encoding and aggregation

    @property
    def fits(self) -> bool:
        return self.tokens <= self.limit


def budget(
    sizes: Sequence[tuple[int, int]], config: EasyRefConfig, size: int, itemsize: int = 4, text: int = TEXT
) -> Budget:
    """What references of these (height, width) take at a nominal size. itemsize: bytes of a number; text: its tokens."""
    seen = tuple(resized_sizes(*one, config, size)[1] for one in sizes)
    patches = [height * width // config.patch_size**2 for height, width in seen]
    image_tokens = tuple(count // config.merge_size**2 for count in patches)
    tokens = sum(image_tokens) + MARKS * len(seen) + text
    return Budget(
        seen,
        image_tokens,
        tokens,
        config.max_positions - config.num_tokens,
        config.activation_bytes(sum(patches), tokens + config.num_tokens, itemsize),
        operations(config, patches, tokens),
    )


def largest_size(
    sizes: Sequence[tuple[int, int]], config: EasyRefConfig, wanted: int, text: int = TEXT
) -> int | None:
    """The largest nominal size, at most `wanted`, at which the group fits the MLLM's context; None if none does."""
    unit = config.pixels_per_token
    tried = [wanted, *range(wanted // unit * unit, 2 * unit - 1, -unit)]
    return next((size for size in tried if budget(sizes, config, size, text=text).fits), None)


def operations(config: EasyRefConfig, patches: Sequence[int], tokens: int) -> int:
    """Two for each weight that a patch or a token meets, and those of the attention; causal attention does half."""
    width, inner = config.vision_width, config.vision_mlp_width
    block = 4 * width**2 + 2 * width * inner
    merged = width * config.merge_size**2
    merger = (merged**2 + merged * config.hidden_size) // config.merge_size**2
    vision = sum(patches) * (config.patch_values * width + config.vision_depth * block + merger)
    vision += 2 * config.vision_depth * width * sum(count**2 for count in patches)
    hidden, kv = config.hidden_size, config.kv_heads * config.head_dim
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * config.intermediate_size
    decoder = config.body_layers * (tokens * layer + hidden * tokens**2)
    return 2 * (vision + decoder)
