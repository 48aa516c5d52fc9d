"""Procedural images of 64 pixels with five independent attributes, and their captions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 64  # pixels
CELL = 8  # pixels, half the period of the textures: one latent

# The attributes of an image are one index for each of these, in this order.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "cross", "ring", "star"),
    "colour": ("red", "yellow", "green", "blue", "purple", "white"),
    "texture": ("plain", "striped", "checkered", "dotted"),
    "background": ("sand", "grass", "water", "stone", "coal", "wine"),
    "place": ("centre", "left", "right", "top", "bottom"),
}
NAMES = tuple(ATTRIBUTES)
COUNTS = tuple(len(values) for values in ATTRIBUTES.values())

COLOURS = np.array(
    [(235, 50, 45), (250, 215, 50), (70, 205, 70), (50, 95, 240), (170, 70, 225), (245, 245, 245)]
)
GROUNDS = np.array(
    [(196, 164, 116), (44, 92, 44), (36, 110, 128), (118, 118, 120), (24, 24, 28), (96, 26, 56)]
)
OFFSETS = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])  # x and y of each place
OFFSET = 11  # pixels from the centre
RADIUS = (17.0, 20.0)  # pixels, minimum and maximum
SAMPLES = 2  # samples along a side of a pixel
DARK = 0.32  # second tone of a texture, as a fraction of the first
HELD_OUT_EVERY = 5  # one in five triples (shape, colour, texture) is held out from every training


def held_out(attributes: NDArray[np.integer]) -> NDArray[np.bool_]:
    """True for the attributes (..., 5) with a triple (shape, colour, texture) that no training uses."""
    shape, colour, texture = (attributes[..., i] for i in range(3))
    return (shape + 2 * colour + 3 * texture) % HELD_OUT_EVERY == 0


def all_combinations() -> NDArray[np.integer]:
    """All combinations of attributes (4320, 5)."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in COUNTS), indexing="ij"), -1).reshape(-1, len(COUNTS))


def caption(attributes: Iterable[int], named: Iterable[str] = NAMES) -> str:
    """A caption of the attributes (5,) in `named`, such as "a red circle on sand"; "" for none."""
    words = {name: ATTRIBUTES[name][index] for name, index in zip(NAMES, attributes, strict=True)}
    words = {name: words[name] for name in NAMES if name in set(named)}
    if not words:
        return ""
    parts = ["a", words.get("colour"), words.get("texture"), words.get("shape", "thing")]
    if "background" in words:
        parts += ["on", words["background"]]
    if "place" in words:
        parts += ["at the", words["place"]]
    return " ".join(part for part in parts if part)


def render(attributes: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Attributes (N, 5) -> images (N, 64, 64, 3) with small random changes of size, place, rotation, tone."""
    chunks = [_render(part, rng) for part in np.array_split(attributes, max(1, len(attributes) // 256))]
    return np.concatenate(chunks)


def _render(attributes: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.uint8]:
    n = len(attributes)
    shape, colour, texture, ground, place = attributes.T
    side = IMAGE_SIZE * SAMPLES
    axis = ((np.arange(side) + 0.5) / SAMPLES).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")

    def column(values: NDArray) -> NDArray:
        return np.asarray(values, np.float32)[:, None, None]

    centre = IMAGE_SIZE / 2 + OFFSET * OFFSETS[place] + rng.uniform(-2, 2, (n, 2))
    rotation = rng.uniform(-0.2, 0.2, n)
    dx, dy = x - column(centre[:, 0]), y - column(centre[:, 1])
    cos, sin = column(np.cos(rotation)), column(np.sin(rotation))
    radius = column(rng.uniform(*RADIUS, n))
    inside = _inside(shape, (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius)
    dark = inside & _dark(texture, x, y)
    light, dark = _coverage(inside & ~dark), _coverage(dark)  # -> (N, 64, 64, 1)

    tone = (COLOURS[colour] * rng.uniform(0.88, 1.04, (n, 1)) + rng.uniform(-8, 8, (n, 3)))[:, None, None, :]
    slope = 1 + column(rng.uniform(-0.25, 0.25, n)) * (np.arange(IMAGE_SIZE)[:, None] / IMAGE_SIZE - 0.5)
    base = (GROUNDS[ground] * rng.uniform(0.9, 1.1, (n, 1)))[:, None, None, :] * slope[..., None]
    image = tone.astype(np.float32) * (light + DARK * dark) + base * (1 - light - dark)
    return image.clip(0, 255).round().astype(np.uint8)


def _coverage(points: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Fraction of each pixel's samples that are set, (N, side, side) -> (N, 64, 64, 1)."""
    pixels = points.reshape((len(points), IMAGE_SIZE, SAMPLES, IMAGE_SIZE, SAMPLES, 1))
    return pixels.mean(axis=(2, 4), dtype=np.float32)


def _inside(shape: NDArray, x: NDArray, y: NDArray) -> NDArray:
    """True for the points (N, H, W), in radii from the centre, that are inside each image's shape."""
    inside = np.empty(x.shape, bool)
    for number, contains in enumerate(SHAPES):
        rows = shape == number
        inside[rows] = contains(x[rows], y[rows])
    return inside


def _star(x: NDArray, y: NDArray) -> NDArray:
    angle, fifth = np.arctan2(x, -y), 2 * np.pi / 5  # 0 at the top
    # 0 at a point of the star, 1 between two
    inner = np.abs((angle + fifth / 2) % fifth - fifth / 2) / (fifth / 2)
    return np.hypot(x, y) < 1.1 - 0.66 * inner**0.8


def _cross(x: NDArray, y: NDArray) -> NDArray:
    left, down = np.abs(x), np.abs(y)
    return (np.minimum(left, down) < 0.3) & (np.maximum(left, down) < 0.95)


SHAPES = (  # in the order of ATTRIBUTES["shape"]
    lambda x, y: np.hypot(x, y) < 0.95,
    lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.82,
    lambda x, y: (y < 0.72) & (y > -1.0 + 1.9 * np.abs(x)),
    _cross,
    lambda x, y: (np.hypot(x, y) < 1.0) & (np.hypot(x, y) > 0.5),
    _star,
)


def _dark(texture: NDArray, x: NDArray, y: NDArray) -> NDArray:
    """True for the points (N, H, W) with the darker tone; textures are aligned with the latent grid."""
    column, row = x // CELL % 2, y // CELL % 2
    dot = np.hypot(x % CELL - CELL / 2, y % CELL - CELL / 2) < 0.34 * CELL
    textures = [np.zeros_like(dot), row == 1, column != row, dot]
    return np.stack(textures)[texture]
