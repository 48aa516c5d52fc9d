"""Crops, native aspect and face boxes, each by its exact rule."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from easyref_core.training.crops import (
    center_crop,
    expand_box,
    face_crop,
    native_resize,
    native_size,
    resize_short_side,
    square_box,
)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((200, 100), (128, 64)),
        ((100, 200), (64, 128)),
        ((301, 100), (192, 64)),  # the long side is rounded down: 301 * 64 / 100 = 192.64
        ((30, 40), (64, 85)),
        ((80, 64), (80, 64)),
    ],
)
def test_short_side_becomes_the_resolution(size: tuple[int, int], resized: tuple[int, int]) -> None:
    image = noise(*size)
    actual = resize_short_side(image, 64)
    assert actual.size == resized
    assert actual.tobytes() == image.resize(resized, Image.Resampling.BILINEAR).tobytes()
    assert (actual is image) == (size == resized)


def test_center_crop() -> None:
    image = noise(201, 100)  # -> 128 x 64
    crop = center_crop(image, 64)
    resized = image.resize((128, 64), Image.Resampling.BILINEAR)
    assert crop.image.tobytes() == resized.crop((32, 0, 96, 64)).tobytes()
    assert crop[1:] == ((100, 201), (0, 32), (64, 64))  # the file's size, not the resized one
    assert center_crop(noise(64, 101), 64)[1:] == ((101, 64), (18, 0), (64, 64))


@pytest.mark.parametrize(
    ("size", "native"),
    [
        ((512, 512), (1024, 1024)),  # a square always gets the resolution
        ((3000, 3000), (1024, 1024)),
        ((1152, 896), (1152, 896)),  # 0.99 of the area's root: unscaled
        ((1100, 1000), (1152, 1024)),  # 1.02: unscaled, rounded up
        ((1000, 700), (1024, 704)),  # 0.817: unscaled
        ((2048, 1024), (1472, 768)),  # 1.41: 1448.2 x 724.1, rounded up
        ((640, 480), (1216, 896)),  # 0.54: 1182.4 x 886.8
        ((4000, 400), (3264, 384)),  # 1.24: 3238.2 x 323.8
        ((1268, 1000), (1280, 1024)),  # 1.0997: unscaled
        ((1269, 1000), (1216, 960)),  # 1.1001: 1153.5 x 909.0
        ((839, 800), (896, 832)),  # 0.8001: unscaled
        ((838, 800), (1088, 1024)),  # 0.7996: 1048.1 x 1000.5
    ],
)
def test_native_sizes(size: tuple[int, int], native: tuple[int, int]) -> None:
    assert native_size(*size, 1024) == native


def test_native_resize_crops_nothing_and_conditions_on_the_new_size() -> None:
    image = noise(200, 100)
    crop = native_resize(image, 64)
    assert crop.image.tobytes() == image.resize((128, 64), Image.Resampling.BICUBIC).tobytes()
    assert crop[1:] == ((64, 128), (0, 0), (64, 128))


@pytest.mark.parametrize(
    ("face", "box"),
    [
        ((10, 20, 49, 59), (9, 19, 49, 59)),  # 40 wide; the center 29.5 is rounded down
        ((10, 20, 29, 59), (-1, 19, 39, 59)),  # the longer side
        ((10, 20, 50, 60), (10, 20, 50, 60)),  # 41 is rounded down to 40
        ((10.7, 20.2, 49.9, 40.0), (10, 10, 50, 50)),
    ],
)
def test_face_box_becomes_square(face: tuple[float, ...], box: tuple[int, ...]) -> None:
    assert square_box(face) == box


@pytest.mark.parametrize(
    ("box", "percent", "expanded"),
    [
        ((40, 40, 60, 60), 0, (40, 40, 60, 60)),
        ((40, 40, 60, 60), 25, (35, 35, 65, 65)),
        ((40, 40, 60, 60), 49, (31, 31, 69, 69)),  # 9.8 is rounded down
        ((0, 40, 20, 60), 50, (0, 30, 40, 70)),  # shifted right
        ((85, 65, 105, 85), 0, (80, 60, 100, 80)),  # shifted left and up, exactly to the edge
        ((10, 10, 70, 70), 50, (0, 0, 80, 80)),  # limited to the image's height
        ((-10, -10, 90, 90), 10, (0, 0, 80, 80)),  # larger than the image
    ],
)
def test_box_expands_inside_the_image(box: tuple[int, ...], percent: int, expanded: tuple[int, ...]) -> None:
    assert expand_box(box, percent, 100, 80) == expanded


def test_random_boxes_stay_inside_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = rng.integers(20, 200, 2).tolist()
        x1, y1 = rng.integers(-20, 180, 2).tolist()
        face = (x1, y1, x1 + int(rng.integers(14, 150)), y1 + int(rng.integers(14, 150)))
        left, top, right, bottom = expand_box(square_box(face), int(rng.integers(50)), width, height)
        assert right - left == bottom - top > 0
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_faces_expand_by_0_to_49_percent_and_half_are_mirrored() -> None:
    image = Image.new("RGB", (400, 400))
    image.paste((255, 0, 0), (0, 0, 200, 400))  # red on the left
    rng = np.random.default_rng(0)
    crops = [face_crop(image, (150, 150, 249, 249), rng) for _ in range(2000)]
    sides = [crop.width for crop in crops]
    assert set(sides) == {100 + 2 * percent for percent in range(50)}
    assert np.mean(sides) == pytest.approx(149, abs=2)
    mirrored = [crop.getpixel((0, 0)) == (0, 0, 0) for crop in crops]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.04)
