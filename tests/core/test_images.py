"""Resizing, thumbnails, square crops, and the black and noise images of the unconditional input."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

import easyref_core as er
from devkit import golden
from easyref_core.mllm.budget import MemoryOptions
from easyref_core.mllm.preprocess import pixel_limits, preprocess, resize, target_size
from easyref_core.utils.images import black_image, middle_square, noise_image, square_around, thumbnail

from .errors import assert_says, error_of


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    assert pixel_limits(336) == (11**2 * 28**2, (12**2 + 1) * 28**2)

    numbers = random.Random(0)
    sides = [(numbers.randint(28, 3000), numbers.randint(28, 3000)) for _ in range(2000)]
    low, high = pixel_limits(336)
    ours = [target_size(height, width, 28, low, high) for height, width in sides]
    assert ours == [smart_resize(height, width, 28, low, high) for height, width in sides]


RESIZED = {(1024, 1024): (336, 336), (40, 40): (308, 308), (1920, 1080): (448, 252), (1080, 1920): (252, 448)}


@pytest.mark.parametrize("size", RESIZED)
def test_resized_size(model: er.EasyRef, size: tuple[int, int]) -> None:
    assert resize(Image.new("RGB", size), model.config).size == RESIZED[size]


def test_group_of_mixed_sizes_keeps_its_order(model: er.EasyRef) -> None:
    images = [Image.new("RGB", size) for size in ((100, 100), (100, 300), (300, 100))]
    _, grid = preprocess(images, model.config, golden.SIZE)
    assert grid.tolist() == [[1, 6, 6], [1, 10, 2], [1, 2, 10]]


@pytest.mark.parametrize("size", [0, 55, 3585, 100_000])
def test_size_out_of_bounds_is_refused(model: er.EasyRef, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size is {size} pixels; wanted 56 to 3584"):
        preprocess([black_image()], model.config, size)


@pytest.mark.parametrize("shape", [(2000, 3000, 3), (14, 2000, 3), (20, 20, 1), (64, 64, 4)])
def test_thumbnail_keeps_the_aspect(shape: tuple[int, ...]) -> None:
    small = thumbnail(torch.rand(shape), 128)
    assert max(small.size) <= 128
    if min(small.size) > 10:
        assert small.width / small.height == pytest.approx(shape[1] / shape[0], rel=0.05)


# Crops


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 200, (50, 0, 150, 100)), (201, 100, (0, 50, 100, 150)), (7, 7, (0, 0, 7, 7))],
)
def test_middle_square(height: int, width: int, box: tuple) -> None:
    assert middle_square(height, width) == box


def marked(height: int, width: int, top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[top : top + side, left : left + side] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "padding", "box"),
    [
        (marked(100, 200, 40, 90, 20), 1.0, (90, 40, 110, 60)),
        (marked(100, 200, 40, 90, 20), 2.0, (80, 30, 120, 70)),
        (marked(100, 200, 0, 0, 20), 2.0, (0, 0, 40, 40)),  # moved inside
        (marked(100, 200, 80, 180, 20), 2.0, (160, 60, 200, 100)),
        (marked(100, 200, 40, 90, 20), 9.0, (50, 0, 150, 100)),  # at most the shorter side
        (marked(50, 100, 20, 45, 10), 1.0, (90, 40, 110, 60)),  # a mask of half the size
        (torch.ones(64, 64), 1.0, (50, 0, 150, 100)),
    ],
)
def test_square_around_a_mask(mask: torch.Tensor, padding: float, box: tuple) -> None:
    assert square_around(mask, 100, 200, padding) == box


def test_empty_mask_is_refused() -> None:
    text = error_of(lambda: square_around(torch.zeros(64, 64), 10, 10, 1.0))
    assert_says(text, "The mask marks nothing", "Paint it")


# The unconditional input


def test_noise_of_strength_0_is_the_black_image(model: er.EasyRef) -> None:
    assert noise_image(5, 0.0).tobytes() == black_image().tobytes()
    black = model.unconditional(size=golden.SIZE)
    assert model.unconditional(size=golden.SIZE, noise_seed=5, noise_strength=0.0) is black


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_strength_is_the_brightness_of_the_noise(strength: float) -> None:
    pixels = np.asarray(noise_image(1, strength)).astype(float)
    assert pixels.max() == pytest.approx(255 * strength, abs=1)
    assert pixels.mean() == pytest.approx(127.5 * strength, abs=0.5)


def test_seed_gives_the_same_noise_on_every_machine() -> None:
    assert np.asarray(noise_image(0, 1.0))[0, :2].tolist() == [[95, 130, 194], [217, 207, 235]]
    assert noise_image(0, 1.0).tobytes() != noise_image(1, 1.0).tobytes()
    assert noise_image(2**64 - 1, 1.0).size == (512, 512)


def test_strength_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise is 2; wanted 0 \(black\) to 1"):
        noise_image(0, 2.0)


def test_noise_changes_the_tokens_and_their_provenance(model: er.EasyRef, uncond: er.ReferenceTokens) -> None:
    noisy = model.unconditional(size=golden.SIZE, noise_seed=3, noise_strength=0.5)
    assert golden.error(noisy, uncond) > 100 * golden.EXACT
    assert noisy.provenance.how == "noise, seed 3, strength 0.5"
    assert uncond.provenance.how == "black image"
    assert model.unconditional(size=golden.SIZE, noise_seed=3, noise_strength=0.5) is noisy


def test_unconditional_tokens_are_evicted(uncond: er.ReferenceTokens) -> None:
    memory = MemoryOptions(unconditional_cache_bytes=2 * uncond.nbytes)
    model = er.load(golden.CHECKPOINT, golden.MLLM, memory=memory)
    first = model.unconditional(size=golden.SIZE)
    for seed in (1, 2):
        model.unconditional(size=golden.SIZE, noise_seed=seed, noise_strength=1.0)
    again = model.unconditional(size=golden.SIZE)
    assert again is not first
    # not to the bit: a part of the text was cached with another noise image's group
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)
