"""Caches of pixels, vision features and decoder prefixes; the prepared group and the encode plan.

The body is causal and the images come before the text, so the keys and values of a group's images do not
depend on what follows them. They are cached with their context states, and so are those of the text, which
begins with the instruction. A group that begins with the same images, in the same order and at the same size,
continues at the first token that differs: after another prompt, at the prompt. The vision features of an
image are cached for any group that it is in, and so are its resized pixels, because hashing an image is
faster than resizing it. Images are hashed and resized in threads: hashes, numpy and PIL release the GIL.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..utils.fast_hash import fast_hash
from ..utils.images import to_rgb
from ..utils.lru_cache import ByteLRUCache
from .preprocess import pixels_of

if TYPE_CHECKING:
    from torch import Tensor

    from .budget import MemoryOptions
    from .config import EasyRefConfig
    from .context import Provenance
    from .qwen2_vl import LayerKV, LayerKVCache

# Of each position: the token's id, or an image token's PreparedImage.digest.
PrefixKey = tuple[int | bytes, ...]
ImageKey = tuple[bytes, int]  # hash_values, and the size in pixels


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """One reference after resizing."""

    pixels: np.ndarray  # bytes (H, W, 3)
    digest: bytes  # hash of the pixels and their shape

    @classmethod
    def of(cls, pixels: np.ndarray) -> PreparedImage:
        return cls(pixels, fast_hash(str(pixels.shape), np.ascontiguousarray(pixels)))


@dataclasses.dataclass(frozen=True)
class PreparedGroup:
    """Input of the MLLM body."""

    images: tuple[PreparedImage, ...]
    grid: Tensor  # (K, 3): frames, rows, columns of each reference in patches
    input_ids: Tensor  # (1, S)
    provenance: Provenance
    spans: tuple[tuple[int, int], ...]  # see ContextStates

    @property
    def patches(self) -> list[int]:
        """Number of patches of each reference."""
        return self.grid.prod(dim=1).tolist()

    @property
    def images_end(self) -> int:
        """Number of positions up to the mark after the last image, which is included."""
        return self.spans[-1][1] + 1

    @cached_property
    def prefix_key(self) -> PrefixKey:
        key: list[int | bytes] = self.input_ids[0].tolist()
        for (start, end), image in zip(self.spans, self.images, strict=True):
            key[start:end] = [image.digest] * (end - start)
        return tuple(key)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """KV cache and context states of a group and its text."""

    key: PrefixKey
    images_end: int  # see PreparedGroup
    layers: tuple[LayerKV, ...]
    states: Tensor  # (1, length, D)

    @property
    def nbytes(self) -> int:
        return self.states.nbytes + sum(k.nbytes + v.nbytes for k, v in self.layers)


@dataclasses.dataclass(frozen=True)
class EncodePlan:
    """Cached results that an encoding starts from, and the work that remains. References count from 0."""

    group: PreparedGroup
    prefix: Prefix | None
    cached_tokens: int  # positions that are taken from the prefix
    uncached_references: tuple[int, ...]  # references that the decoder has to prefill
    features: Mapping[bytes, Tensor]  # cached vision features of the uncached references, by digest
    unencoded_images: tuple[int, ...]  # references for the vision tower, equal images once

    @property
    def new_tokens(self) -> int:
        """Number of positions that the decoder has to prefill."""
        return self.group.input_ids.shape[1] - self.cached_tokens

    @property
    def patches(self) -> list[int]:
        """Number of patches of each unencoded image."""
        counts = self.group.patches
        return [counts[index] for index in self.unencoded_images]


class EncodeCaches:
    """Caches of one model, on one device.

    images: by hash_values and size. features: (image tokens, D), by digest. prefixes: by prefix key.
    """

    def __init__(self, memory: MemoryOptions, device: torch.device) -> None:
        self.device = memory.cache_device or device
        self.images: ByteLRUCache[PreparedImage] = ByteLRUCache(memory.pixel_cache_bytes)
        self.features: ByteLRUCache[Tensor] = ByteLRUCache(memory.feature_cache_bytes)
        self.prefixes: ByteLRUCache[Prefix] = ByteLRUCache(memory.prefix_cache_bytes)

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.device_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes on `device`; images are on the CPU."""
        return self.features.nbytes + self.prefixes.nbytes

    def clear(self) -> None:
        self.images.clear()
        self.clear_device()

    def clear_device(self) -> None:
        """Free the memory on `device`."""
        self.features.clear()
        self.prefixes.clear()

    def prepare(
        self, images: Sequence[Image.Image | Tensor], config: EasyRefConfig, size: int
    ) -> tuple[PreparedImage, ...]:
        """Resize the images of a group that passed check_group, in threads; those that are cached only hash.

        Raises ValueError for non-finite values.
        """
        images = list(images)
        # An object that occurs twice is read once, because PIL reads a file late, and not thread-safely.
        first_of = {id(image): i for i, image in reversed(list(enumerate(images)))}
        distinct = sorted(first_of.values())

        def hash_or_resize(index: int) -> tuple[ImageKey, PreparedImage | None]:
            return self._prepare(images[index], f"reference {index + 1}", config, size)

        with ThreadPoolExecutor(min(len(distinct), os.cpu_count() or 1)) as threads:
            results = dict(zip(distinct, threads.map(hash_or_resize, distinct), strict=True))
        # Every cached image is taken before the first new one is stored, which may evict it.
        prepared = {i: resized or self.images.get(key) for i, (key, resized) in results.items()}
        for key, resized in results.values():
            if resized:
                self.images.put(key, resized, resized.pixels.nbytes)
        return tuple(prepared[first_of[id(image)]] for image in images)

    def plan(self, group: PreparedGroup, use_prefix: bool = True) -> EncodePlan:
        """Plan the encoding of a group; without `use_prefix`, of the features of all its images."""
        prefix, cached_tokens = self._longest_prefix(group) if use_prefix else (None, 0)
        uncached = tuple(i for i, (start, _) in enumerate(group.spans) if start >= cached_tokens)
        first_of = {group.images[i].digest: i for i in reversed(uncached)}
        return EncodePlan(
            group,
            prefix,
            cached_tokens,
            uncached_references=uncached,
            features={digest: self.features.get(digest) for digest in first_of if digest in self.features},
            unencoded_images=tuple(
                sorted(i for digest, i in first_of.items() if digest not in self.features)
            ),
        )

    def put_prefix(self, plan: EncodePlan, layers: Sequence[LayerKVCache], states: Tensor) -> None:
        """Cache a group in place of a prefix whose images it extends; empties `layers` and copies `states`.

        A group whose images are already cached, or that is larger than the cache, is left out.
        """
        group = plan.group
        if plan.cached_tokens >= group.images_end:
            return
        size = states.nbytes + sum(t.nbytes for layer in layers for t in layer.key_value)
        if size > self.prefixes.max_bytes:
            return
        copies = []
        for layer in layers:
            copies.append(tuple(t.to(self.device, copy=True) for t in layer.key_value))
            layer.truncate(0)  # now, so that at most one layer exists twice
        prefix = Prefix(group.prefix_key, group.images_end, tuple(copies), states.clone())
        if plan.prefix and plan.cached_tokens >= plan.prefix.images_end:
            self.prefixes.drop(plan.prefix.key)
        self.prefixes.put(prefix.key, prefix, prefix.nbytes)

    def _prepare(
        self, image: Image.Image | Tensor, name: str, config: EasyRefConfig, size: int
    ) -> tuple[ImageKey, PreparedImage | None]:
        """Return the key of an image and, if it is not cached, the resized image. Called in threads."""
        if isinstance(image, Image.Image):
            image = to_rgb(image, name)
        key = hash_values(image), size
        if key in self.images:
            return key, None
        return key, PreparedImage.of(pixels_of(image, name, config, size))

    def _longest_prefix(self, group: PreparedGroup) -> tuple[Prefix | None, int]:
        """Return the prefix that shares most positions with a group, at least one image, and their number."""
        key = group.prefix_key
        common = {stored: _common_length(stored, key) for stored in self.prefixes}
        best = max(common, key=common.__getitem__, default=None)
        if best is None or common[best] < group.spans[0][1]:
            return None, 0
        # at least one position remains, because a prefill of no tokens would be a special case
        return self.prefixes.get(best), min(common[best], len(key) - 1)


def hash_values(image: Image.Image | Tensor) -> bytes:
    """Hash of the values, shape and type of an image: an RGB image, or a tensor (H, W, C)."""
    if isinstance(image, Image.Image):
        return fast_hash(f"{image.mode} {image.size}", image.tobytes())
    values = image.detach().cpu().contiguous()
    return fast_hash(f"{tuple(values.shape)} {values.dtype}", values.view(torch.uint8).numpy())


def _common_length(first: PrefixKey, second: PrefixKey) -> int:
    """Length of the common prefix of two keys."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
