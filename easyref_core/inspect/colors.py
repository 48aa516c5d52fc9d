"""Colours of the charts: paper and ink for a dark interface, the colours of series, and a colour map."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

PAPER, INK, GREY, FAINT = "#1c1e24", "#f2f3f5", "#aeb3bf", "#3a3f4b"
BLUE, RED, GREEN = "#4f9be8", "#ff6b5e", "#57c785"
PALETTE = (BLUE, "#f2a541", GREEN, "#b48be0", RED, "#4ecbd0", "#d8c24a", "#c58a6b")
# Hues, lightnesses and saturations that further series choose from, where they stand out from the paper.
HUES, LIGHTNESSES, SATURATIONS, MIN_CONTRAST = 24, (0.4, 0.55, 0.7, 0.85), (0.9, 0.5), 3.0
# Anchors of the colour map from 0 to 1. Its brightness rises steadily, so it can be read without colour too.
INFERNO = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def series_colors(count: int) -> list[str]:
    """Return a colour for each of `count` series: PALETTE, then those farthest from all before them.

    They are all different up to 150 series, and repeat above that.
    """
    chosen = [ImageColor.getrgb(colour) for colour in PALETTE]
    candidates = _candidates()
    while len(chosen) < min(count, len(PALETTE) + len(candidates)):
        distance = np.linalg.norm(candidates[:, None] - np.array(chosen)[None], axis=-1).min(axis=1)
        chosen.append(tuple(candidates[distance.argmax()].tolist()))
    return ["#{:02x}{:02x}{:02x}".format(*chosen[i % len(chosen)]) for i in range(count)]


def apply_colormap(values: np.ndarray) -> np.ndarray:
    """Return the INFERNO colours (..., 3) in bytes of values (...) in 0..1."""
    anchors = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(values, anchors, channel) for channel in zip(*INFERNO, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def contrast(first: str | Sequence[int], second: str | Sequence[int]) -> float:
    """Return the contrast ratio of two colours, 1 to 21 (WCAG 2; text needs 4.5)."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str | Sequence[int]) -> float:
    rgb = np.array(ImageColor.getrgb(colour) if isinstance(colour, str) else colour) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _candidates() -> NDArray[np.integer]:
    """Return colours (N, 3) in bytes that further series choose from."""
    colours = [
        colorsys.hls_to_rgb(hue / HUES, lightness, saturation)
        for hue in range(HUES)
        for lightness in LIGHTNESSES
        for saturation in SATURATIONS
    ]
    in_bytes = (255 * np.array(colours)).round().astype(int)
    return np.array([colour for colour in in_bytes if contrast(colour, PAPER) >= MIN_CONTRAST])
