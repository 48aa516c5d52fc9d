"""Framing: the crop, the native aspect and the face box, each by its exact rule."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from easyref_core.training.crops import (
    crop_frame,
    expanded,
    face_crop,
    native_frame,
    native_size,
    short_side,
    single_reference,
    square,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((200, 100), (128, 64)), ((100, 200), (64, 128)), ((301, 100), (192, 64)), ((30, 40), (64, 85))],
)
def test_the_short_side_becomes_the_resolution(size: tuple[int, int], resized: tuple[int, int]) -> None:
    image = noise(*size)
    found = short_side(image, 64)
    assert found.size == resized  # the long side is rounded down: 301 * 64 / 100 = 192.64
    assert found.tobytes() == image.resize(resized, Image.Resampling.BILINEAR).tobytes()


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = noise(80, 64)
    assert short_side(image, 64) is image


def test_the_crop_is_the_middle() -> None:
    image = noise(201, 100)  # -> 128 x 64
    framed = crop_frame(image, 64)
    whole = image.resize((128, 64), Image.Resampling.BILINEAR)
    assert framed.image.tobytes() == whole.crop((32, 0, 96, 64)).tobytes()
    assert framed[1:] == ((100, 201), (0, 32), (64, 64))  # the file's size, not the resized one


def test_a_tall_picture_is_cropped_above_and_below() -> None:
    assert crop_frame(noise(64, 101), 64)[1:] == ((101, 64), (18, 0), (64, 64))


@pytest.mark.parametrize(
    ("size", "native"),
    [
        ((512, 512), (1024, 1024)),  # a square is always the resolution
        ((3000, 3000), (1024, 1024)),
        ((1152, 896), (1152, 896)),  # 0.99 of the area's root: kept
        ((1100, 1000), (1152, 1024)),  # 1.02: kept, rounded up
        ((1000, 700), (1000 // 64 * 64 + 64, 704)),  # 0.817: kept
        ((2048, 1024), (1472, 768)),  # 1.41: 1448.2 x 724.1, rounded up
        ((640, 480), (1216, 896)),  # 0.54: 1182.4 x 886.8
        ((4000, 400), (3264, 384)),  # 1.24: 3238.2 x 323.8
    ],
)
def test_native_sizes(size: tuple[int, int], native: tuple[int, int]) -> None:
    assert native_size(*size, 1024) == native


@pytest.mark.parametrize(
    ("size", "native"),
    [
        ((1268, 1000), (1280, 1024)),  # 1.0997: kept
        ((1269, 1000), (1216, 960)),  # 1.1001: 1153.5 x 909.0
        ((839, 800), (896, 832)),  # 0.8001: kept
        ((838, 800), (1088, 1024)),  # 0.7996: 1048.1 x 1000.5
    ],
)
def test_native_scales_only_above_1_1_and_below_0_8(size: tuple[int, int], native: tuple[int, int]) -> None:
    assert native_size(*size, 1024) == native


def test_native_keeps_the_whole_picture_and_tells_sdxl_its_new_size() -> None:
    image = noise(200, 100)
    framed = native_frame(image, 64)
    assert framed.image.size == (128, 64)
    assert framed.image.tobytes() == image.resize((128, 64), Image.Resampling.BICUBIC).tobytes()
    assert framed[1:] == ((64, 128), (0, 0), (64, 128))


def test_a_single_reference_is_cropped_as_its_target() -> None:
    image = noise(190, 120)
    assert single_reference(image, 64).tobytes() == crop_frame(image, 64).image.tobytes()


def test_a_reference_of_another_aspect_stays_in_its_picture() -> None:
    """The authors' cut, at the target's corner, would leave a square face's crop to one side: black bars."""
    white = Image.new("RGB", (50, 50), "white")
    assert np.asarray(single_reference(white, 64)).min() == 255


@pytest.mark.parametrize(
    ("face", "box"),
    [
        ((10, 20, 49, 59), (9, 19, 49, 59)),  # 40 wide; the middle 29.5 is rounded down
        ((10, 20, 29, 59), (-1, 19, 39, 59)),  # the longer side
        ((10, 20, 50, 60), (10, 20, 50, 60)),  # 41 is rounded down to 40
        ((10.7, 20.2, 49.9, 40.0), (10, 10, 50, 50)),
    ],
)
def test_the_face_box_becomes_square(face: tuple[float, ...], box: tuple[int, ...]) -> None:
    assert square(face) == box


@pytest.mark.parametrize(
    ("box", "percent", "found"),
    [
        ((40, 40, 60, 60), 0, (40, 40, 60, 60)),
        ((40, 40, 60, 60), 25, (35, 35, 65, 65)),
        ((40, 40, 60, 60), 49, (31, 31, 69, 69)),  # 9.8 is rounded down
        ((0, 40, 20, 60), 50, (0, 30, 40, 70)),  # shifted right
        ((85, 65, 105, 85), 0, (80, 60, 100, 80)),  # shifted left and up, to the edge and not beyond
        ((10, 10, 70, 70), 50, (0, 0, 80, 80)),  # no more than the picture is high
        ((-10, -10, 90, 90), 10, (0, 0, 80, 80)),  # larger than the picture
    ],
)
def test_the_box_grows_and_is_shifted_into_the_picture(
    box: tuple[int, ...], percent: int, found: tuple[int, ...]
) -> None:
    assert expanded(box, percent, 100, 80) == found


def test_a_box_never_leaves_its_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = rng.integers(20, 200, 2).tolist()
        x1, y1 = rng.integers(-20, 180, 2).tolist()
        face = (x1, y1, x1 + int(rng.integers(14, 150)), y1 + int(rng.integers(14, 150)))
        left, top, right, bottom = expanded(square(face), int(rng.integers(50)), width, height)
        assert right - left == bottom - top > 0
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_faces_expand_by_0_to_49_percent_and_are_mirrored_half_the_time() -> None:
    image = Image.new("RGB", (400, 400))
    image.paste((255, 0, 0), (0, 0, 200, 400))  # red on the left
    rng = np.random.default_rng(0)
    crops = [face_crop(image, (150, 150, 249, 249), rng) for _ in range(2000)]
    sides = [crop.width for crop in crops]
    assert set(sides) == {100 + 2 * percent for percent in range(50)}
    assert np.mean(sides) == pytest.approx(149, abs=2)
    mirrored = [crop.getpixel((0, 0)) == (0, 0, 0) for crop in crops]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.04)
