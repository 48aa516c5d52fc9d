"""Pictures that are the same: to the pixel, or to the eye. In a group they add length and nothing to what it shares.

Near-duplicate: the 64-bit perceptual hashes (signs of the lowest frequencies) differ in at most 6 bits, and the 8x8
thumbnails differ by at most 16 of 255 on average. That finds a picture saved again, resized, or a little brighter.
It does not find a crop, a mirrored copy or a recoloured one.
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

Name = TypeVar("Name")  # what tells pictures apart: a file, a place in a group

HASH_DISTANCE = 6  # of 64 bits; two unrelated pictures differ in about 32
THUMBNAIL_DISTANCE = 16.0  # of 255
SIDE, LOW = 32, 8  # pixels the frequencies are computed from; frequencies kept along a side
ROWS = 1024  # pictures compared with all others at a time


class Fingerprint(NamedTuple):
    """What two pictures are compared by."""

    pixels: str  # hash of the decoded pixels
    bits: NDArray[np.bool_]  # (64,)
    thumbnail: NDArray[np.float32]  # (192,), 8x8 RGB


class Pair(NamedTuple):
    """Two pictures that are one."""

    first: Any
    second: Any
    distance: int  # differing bits of their hashes; 0 and `same` for identical pixels
    same: bool

    def __str__(self) -> str:
        how = "the same pixels" if self.same else f"near-duplicates, {self.distance} of 64 bits apart"
        return f"{self.first} and {self.second} ({how})"


def fingerprint(picture: Image.Image) -> Fingerprint:
    """The picture's fingerprint; it must be RGB."""
    pixels = sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    thumbnail = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).reshape(-1)
    return Fingerprint(pixels, perceptual_hash(picture), thumbnail)


def perceptual_hash(picture: Image.Image) -> NDArray[np.bool_]:
    """(64,) bits: which of the lowest 8x8 DCT frequencies of the grey 32x32 picture lie above their median."""
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    cosines = np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))  # DCT-II, (8, 32)
    frequencies = (cosines @ grey @ cosines.T).reshape(-1)
    return frequencies > np.median(frequencies[1:])  # the first is the mean brightness


def find_duplicates(prints: Mapping[Name, Fingerprint], near: bool = True) -> list[Pair]:
    """Every pair of pictures that are one; `near`: also those that are the same to the eye."""
    names, values = list(prints), list(prints.values())
    return [
        Pair(names[i], names[j], int((values[i].bits ^ values[j].bits).sum()), same)
        for i, j in _candidates(values)
        if (same := values[i].pixels == values[j].pixels) or (near and _near(values[i], values[j]))
    ]


def first_of_each(prints: Mapping[Name, Fingerprint], near: bool = True) -> dict[Name, Name]:
    """What to drop, and which picture it repeats: of every pair the one that comes later, unless it was kept for another."""
    return {pair.second: pair.first for pair in repeats(prints, near)}


def duplicates(images: Sequence[Image.Image | Tensor]) -> list[Pair]:
    """The references, numbered from 1, that repeat an earlier one, each with the first that it repeats.

    images: as for preprocess; what holds no picture is like no other.
    """
    prints = {}
    for number, image in enumerate(images, start=1):
        with contextlib.suppress(ValueError):
            prints[number] = fingerprint(to_rgb(image))
    return repeats(prints)


def repeats(prints: Mapping[Name, Fingerprint], near: bool = True) -> list[Pair]:
    """Each picture that repeats an earlier one, with the first that it repeats and that repeats none itself."""
    found: dict[Name, Pair] = {}
    for pair in find_duplicates(prints, near):  # in the order of `prints`
        if pair.first not in found:
            found.setdefault(pair.second, pair)
    return list(found.values())


def _near(a: Fingerprint, b: Fingerprint) -> bool:
    return bool(np.abs(a.thumbnail - b.thumbnail).mean() <= THUMBNAIL_DISTANCE)


def _candidates(values: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    """Pairs (i < j) whose hashes are close, in order. Identical pixels have identical hashes, so they are among them."""
    if not values:
        return
    signs = np.stack([value.bits for value in values]).astype(np.float32) * 2 - 1  # (n, 64)
    for start in range(0, len(signs), ROWS):
        distance = (signs.shape[1] - signs[start : start + ROWS] @ signs.T) / 2
        for i, j in np.argwhere(distance <= HASH_DISTANCE):
            if start + i < j:
                yield int(start + i), int(j)
