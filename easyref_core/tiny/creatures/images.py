"""Images of creatures on grounds, 64 pixels wide."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from .identities import AMPLITUDES, ANGLE, FREQUENCY, HARMONICS, THRESHOLD, Floats, draw_identities, split

IMAGE_SIZE = 64  # pixels
MAX_CREATURES = 3  # in an image
GROUNDS = {
    "sand": (196, 164, 116),
    "grass": (44, 92, 44),
    "water": (36, 110, 128),
    "stone": (118, 118, 120),
    "coal": (24, 24, 28),
    "wine": (96, 26, 56),
}
PLACES = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
# A creature alone has one size and is upright, and places are a latent apart: beside ground and place, a UNet
# has only the identity to paint. With shifts and turns, so small a UNet spends its training on those.
OFFSET = 8  # pixels from the centre to a place
RADIUS = 18.0  # pixels, of a creature alone
# Among others, creatures differ in size, turn and place.
SMALL_RADIUS = (9.0, 12.0)  # pixels
TURN = 0.4  # radians, maximum
JITTER = 3.0  # pixels, maximum shift from the centre of a quarter

RIM, RIM_TONE = 0.14, 0.35  # width of the dark rim in radii, and its tone as a fraction of the body's
EYES = ((-0.3, -0.22), (0.3, -0.22))  # in radii
EYE, PUPIL = 0.21, 0.11  # radii
LARGEST = 1 + 1.25 * sum(AMPLITUDES)  # radii, beyond the outline of nearly every creature
CHUNK = 16  # creatures that are painted together; their arrays fit into a cache
MARGIN = math.ceil(LARGEST * RADIUS)  # pixels around the image, in which creatures may reach
_GROUND_COLOURS = np.array(list(GROUNDS.values()), np.float32)
_OFFSETS = np.array(list(PLACES.values()), np.float32)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """N images with up to M creatures each."""

    identities: Floats  # (N, M, 13)
    centres: Floats  # (N, M, 2), x and y in pixels
    radii: Floats  # (N, M), pixels; 0 for a creature that is absent
    turns: Floats  # (N, M), radians
    grounds: NDArray[np.integer]  # (N,), indices of GROUNDS

    def __len__(self) -> int:
        return len(self.grounds)

    def __getitem__(self, rows: NDArray[np.integer] | slice) -> Scenes:
        """The scenes of some images."""
        return Scenes(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def alone(identities: Floats, grounds: NDArray[np.integer], places: NDArray[np.integer]) -> Scenes:
    """One large creature in each image: identities (N, 13), grounds (N,), places (N,), indices of PLACES."""
    centres = IMAGE_SIZE / 2 + OFFSET * _OFFSETS[places]
    radii = np.full((len(identities), 1), RADIUS)
    return Scenes(identities[:, None], centres[:, None], radii, np.zeros_like(radii), grounds)


def among_others(identities: Floats, rng: np.random.Generator) -> Scenes:
    """Identities (N, 13), each with one or two others, small, in different quarters of its image.

    Others, quarters, sizes, turns and grounds are drawn anew for every image; the first creature of the
    scenes is the given one.
    """
    count = len(identities)
    others = draw_identities(rng, count, MAX_CREATURES - 1)
    identities = np.concatenate([identities[:, None], others], axis=1)
    quarters = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)[:, :MAX_CREATURES]
    centres = IMAGE_SIZE / 4 + IMAGE_SIZE / 2 * np.stack([quarters % 2, quarters // 2], axis=-1)
    centres = centres + rng.uniform(-JITTER, JITTER, centres.shape)
    radii = rng.uniform(*SMALL_RADIUS, (count, MAX_CREATURES))
    radii[:, -1] *= rng.random(count) < 0.5
    turns = rng.uniform(-TURN, TURN, radii.shape)
    return Scenes(identities, centres, radii, turns, rng.integers(len(GROUNDS), size=count))


def render(scenes: Scenes, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render scenes -> (N, 64, 64, 3); the grounds vary a little in tone."""
    count = len(scenes)
    tone = rng.uniform(0.9, 1.1, (count, 1, 1, 1))
    slope = 1 + rng.uniform(-0.25, 0.25, (count, 1, 1, 1)) * (np.arange(IMAGE_SIZE)[:, None, None] / 64 - 0.5)
    ground = (_GROUND_COLOURS[scenes.grounds][:, None, None] * tone * slope).astype(np.float32)
    canvas = np.zeros((count, IMAGE_SIZE + 2 * MARGIN, IMAGE_SIZE + 2 * MARGIN, 3), np.float32)
    image = canvas[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    image[:] = ground
    for creature in range(scenes.radii.shape[1]):
        rows = np.flatnonzero(scenes.radii[:, creature])
        for part in np.array_split(rows, max(1, len(rows) // CHUNK)):
            _paint(canvas, part, scenes, creature)
    return (image.clip(0, 255) + 0.5).astype(np.uint8)


def _paint(canvas: Floats, rows: NDArray[np.integer], scenes: Scenes, creature: int) -> None:
    """Paint one creature of the scenes in `rows` onto the canvas, which has a margin, in place."""
    if not len(rows):
        return
    radius, turn = (
        values[rows, creature, None, None].astype(np.float32) for values in (scenes.radii, scenes.turns)
    )
    centre = scenes.centres[rows, creature].astype(np.float32)
    # Only a window around the creature is computed; the margin keeps it inside the canvas.
    half = math.ceil(LARGEST * radius.max())
    axis = np.arange(-half, half)
    corner = np.floor(centre).astype(int)
    columns, lines = corner[:, 0, None, None] + axis, corner[:, 1, None, None] + axis[:, None]
    dx = (columns + np.float32(0.5) - centre[:, 0, None, None]).astype(np.float32) / radius
    dy = (lines + np.float32(0.5) - centre[:, 1, None, None]).astype(np.float32) / radius
    cos, sin = np.cos(turn), np.sin(turn)
    x, y = dx * cos + dy * sin, dy * cos - dx * sin  # -> (n, H, W), in radii
    parts = {name: part[..., None, None] for name, part in split(scenes.identities[rows, creature]).items()}
    distance = np.sqrt(x * x + y * y)
    inward = _outline(parts["outline"], x, y, distance) - distance

    def edge(values: Floats) -> Floats:
        """Coverage of a pixel, from a distance to the edge in radii, positive inside."""
        return (values * radius + 0.5).clip(0, 1)[..., None]

    body, stripe = ((0.5 + 0.45 * part) * 255 for part in np.split(parts["colours"][..., 0, 0], 2, axis=-1))
    striped = _striped(parts["pattern"], x, y, radius)[..., None]
    colour = body[:, None, None] * (1 - striped) + stripe[:, None, None] * striped
    colour *= RIM_TONE + (1 - RIM_TONE) * edge(inward - RIM)
    for eye_x, eye_y in EYES:
        away = np.sqrt((x - eye_x) ** 2 + (y - eye_y) ** 2)
        for size, tone in ((EYE, 250), (PUPIL, 13)):
            covered = edge(size - away)
            colour = colour * (1 - covered) + tone * covered
    covered = edge(inward)
    window = rows[:, None, None], lines + MARGIN, columns + MARGIN
    canvas[window] = canvas[window] * (1 - covered) + colour * covered


def _outline(numbers: Floats, x: Floats, y: Floats, distance: Floats) -> Floats:
    """Radius of the outline in the direction of the points (n, H, W), from numbers (n, 4, 1, 1)."""
    point = (x + 1j * y) / np.maximum(distance, 1e-6)  # e^(i angle)
    radius = np.ones_like(distance)
    for i, (harmonic, amplitude) in enumerate(zip(HARMONICS, AMPLITUDES, strict=True)):
        wave = point**harmonic
        radius += amplitude * (numbers[:, 2 * i] * wave.real + numbers[:, 2 * i + 1] * wave.imag)
    return radius


def _striped(numbers: Floats, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Fraction (n, H, W) of the second colour, from numbers (n, 3, 1, 1): frequency, angle, threshold."""
    low, high = FREQUENCY
    frequency = (low + high) / 2 + (high - low) / 2 * numbers[:, 0]
    angle = ANGLE * numbers[:, 1]
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    slope = 2 * np.pi * frequency / radius  # of the wave, per pixel
    return ((wave - THRESHOLD * numbers[:, 2]) / slope + 0.5).clip(0, 1)
