"""The sizes references are resized to, which the golden images show only in part."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

import easyref_core as er
from devkit import golden
from easyref_core.mllm.preprocess import pixel_limits, preprocess, resize, target_size
from easyref_core.utils.images import black_image


def test_limits_at_the_authors_size() -> None:
    assert pixel_limits(336) == (11**2 * 28**2, (12**2 + 1) * 28**2)


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    numbers = random.Random(0)
    sides = [(numbers.randint(28, 3000), numbers.randint(28, 3000)) for _ in range(2000)]
    low, high = pixel_limits(336)
    ours = [target_size(height, width, 28, low, high) for height, width in sides]
    assert ours == [smart_resize(height, width, 28, low, high) for height, width in sides]


@pytest.mark.parametrize(
    ("given", "resized"),
    [
        ((1024, 1024), (336, 336)),
        ((40, 40), (308, 308)),  # a small picture grows to the lower limit
        ((1920, 1080), (448, 252)),
        ((1080, 1920), (252, 448)),
    ],
)
def test_pictures_of_the_real_world_at_the_authors_size(
    model: er.EasyRef, given: tuple[int, int], resized: tuple[int, int]
) -> None:
    assert resize(Image.new("RGB", given), model.config).size == resized


def test_a_group_of_mixed_sizes_keeps_its_order(model: er.EasyRef) -> None:
    images = [Image.new("RGB", size) for size in ((100, 100), (100, 300), (300, 100))]
    _, grid = preprocess(images, model.config, golden.SIZE)
    assert grid.tolist() == [[1, 6, 6], [1, 10, 2], [1, 2, 10]]


@pytest.mark.parametrize("size", [0, 55, 3585, 100_000])
def test_size_out_of_bounds_names_the_bounds(model, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size is {size} pixels; wanted 56 to 3584"):
        preprocess([black_image()], model.config, size)


def test_one_image_instead_of_a_list_is_named(model) -> None:
    with pytest.raises(TypeError, match="wanted a list"):
        preprocess(black_image(), model.config)


def test_array_is_named(model) -> None:
    with pytest.raises(TypeError, match="reference 1 is a ndarray; wanted a PIL image"):
        preprocess([np.zeros((28, 28, 3))], model.config)
