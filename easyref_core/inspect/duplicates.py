"""Duplicate images: equal pixels, or near-duplicates. In a group they cost tokens without adding information.

Near-duplicate: the 64-bit perceptual hashes (signs of the lowest frequencies) differ in at most 6 bits, and
the 8x8 thumbnails differ by at most 16 of 255 on average. That finds an image that was saved again, resized,
or made a little brighter. It does not find a crop, a mirrored copy or a recoloured one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ..utils.images import to_rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Name = TypeVar("Name")  # an image's key, such as its path or its position in a group

MAX_HASH_DISTANCE = 6  # of 64 bits; two unrelated images differ in about 32
MAX_THUMBNAIL_DISTANCE = 16.0  # of 255
DCT_SIDE, DCT_FREQUENCIES = 32, 8  # pixels along a side, and frequencies used along a side
CHUNK_ROWS = 1024  # images compared with all others at a time, because the distances are a dense matrix


class Fingerprint(NamedTuple):
    """Fingerprint of an image for comparison with others."""

    pixels: str  # SHA-256 of the decoded pixels
    bits: NDArray[np.bool_]  # (64,)
    thumbnail: NDArray[np.float32]  # (192,), 8x8 RGB


class Pair(NamedTuple):
    """Two duplicate images. distance: number of differing hash bits. same: True if all pixels are equal."""

    first: Any
    second: Any
    distance: int
    same: bool

    def __str__(self) -> str:
        how = "the same pixels" if self.same else f"near-duplicates, {self.distance} of 64 bits apart"
        return f"{self.first} and {self.second} ({how})"


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB image."""
    pixels = sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).reshape(-1)
    return Fingerprint(pixels, perceptual_hash(image), thumbnail)


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """Return (64,) bits: True where one of the lowest 8x8 DCT frequencies exceeds their median."""
    side = DCT_SIDE
    grey = np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX), dtype=np.float64)
    k, n = np.arange(DCT_FREQUENCIES)[:, None], np.arange(side)[None]
    cosines = np.cos(np.pi * k * (2 * n + 1) / (2 * side))  # DCT-II, (8, 32)
    frequencies = (cosines @ grey @ cosines.T).reshape(-1)
    return frequencies > np.median(frequencies[1:])  # the first is the mean brightness


def find_duplicates(prints: Mapping[Name, Fingerprint], near: bool = True) -> list[Pair]:
    """Return every pair of duplicates in order; near: include near-duplicates."""
    names, values = list(prints), list(prints.values())
    return [
        Pair(names[i], names[j], int((values[i].bits ^ values[j].bits).sum()), same)
        for i, j in _candidates(values)
        if (same := values[i].pixels == values[j].pixels) or (near and _near(values[i], values[j]))
    ]


def first_of_each(prints: Mapping[Name, Fingerprint], near: bool = True) -> dict[Name, Name]:
    """Return {duplicate to drop: image it repeats}; the repeated image is never dropped itself."""
    return {pair.second: pair.first for pair in repeats(prints, near)}


def duplicates(images: Sequence[Image.Image | Tensor]) -> list[Pair]:
    """Return the images, numbered from 1, that repeat an earlier one, each with the first that it repeats.

    images: as for preprocess. An image that cannot be converted to RGB is skipped.
    """
    prints = {}
    for number, image in enumerate(images, start=1):
        with contextlib.suppress(ValueError):
            prints[number] = fingerprint(to_rgb(image))
    return repeats(prints)


def repeats(prints: Mapping[Name, Fingerprint], near: bool = True) -> list[Pair]:
    """Return each image that repeats an earlier one, with the first such image that is not a repeat."""
    pairs: dict[Name, Pair] = {}
    for pair in find_duplicates(prints, near):  # in the order of `prints`
        if pair.first not in pairs:
            pairs.setdefault(pair.second, pair)
    return list(pairs.values())


def _near(a: Fingerprint, b: Fingerprint) -> bool:
    return bool(np.abs(a.thumbnail - b.thumbnail).mean() <= MAX_THUMBNAIL_DISTANCE)


def _candidates(values: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    """Yield the pairs (i < j) with close hashes, in order; they include images with equal pixels."""
    if not values:
        return
    signs = np.stack([value.bits for value in values]).astype(np.float32) * 2 - 1  # (n, 64)
    for start in range(0, len(signs), CHUNK_ROWS):
        distance = (signs.shape[1] - signs[start : start + CHUNK_ROWS] @ signs.T) / 2
        for i, j in np.argwhere(distance <= MAX_HASH_DISTANCE):
            if start + i < j:
                yield int(start + i), int(j)
