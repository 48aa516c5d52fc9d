"""Presets, the budget of a group, duplicates among references, and crops."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

import easyref_core as er
from devkit import golden
from easyref_core.inspect.duplicates import duplicates, thumbnail
from easyref_core.mllm.presets import LANGUAGES, PRESETS
from easyref_core.utils.crop import middle_square, square_around

from .errors import assert_says, error_of

# Presets


def test_the_general_preset_is_the_authors_text() -> None:
    assert next(iter(PRESETS)) == "general"
    assert PRESETS["general"][LANGUAGES[0]] == er.INSTRUCTION == golden.SETTINGS["instruction"]


def test_every_preset_has_every_language_and_leads_over_to_the_prompt() -> None:
    texts = [PRESETS[name][language] for name, language in itertools.product(PRESETS, LANGUAGES)]
    assert len(set(texts)) == len(texts)
    assert all(text.endswith((":\n", "：\n")) for text in texts)


# Budget


def picture_sides() -> list[tuple[int, int]]:
    return [image.size for image in golden.references()]


@pytest.mark.parametrize("size", [golden.SIZE, 84, 140, 336])
def test_the_budget_is_what_encoding_makes(model: er.EasyRef, size: int) -> None:
    group = model.prepare(golden.references(), golden.PROMPT, er.INSTRUCTION, size)
    found = model.budget(picture_sides(), golden.PROMPT, size=size)
    assert found.total == group.input_ids.shape[1]
    assert list(found.tokens) == [end - start for start, end in group.spans]
    patch = model.config.patch_size
    assert [[1, height // patch, width // patch] for width, height in found.sides] == group.grid.tolist()
    assert found.limit == model.config.max_positions - model.config.num_tokens


def test_the_budget_counts_the_operations_of_the_matrix_products(model: er.EasyRef) -> None:
    """As torch counts them, where attention is a matrix product like the others."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model.forget()
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model.encode(golden.references(), golden.PROMPT, size=golden.SIZE)
    found = model.budget(picture_sides(), golden.PROMPT, size=golden.SIZE).flops
    assert found == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_the_largest_size_is_the_largest_that_encodes(model: er.EasyRef) -> None:
    pictures, images = [(1008, 1008)] * 12, [Image.new("RGB", (1008, 1008))] * 12
    size = model.largest_size(pictures, size=1008)
    assert size % 28 == 0
    assert 84 < size < 1008
    assert model.budget(pictures, size=size).fits()
    assert_says(
        error_of(lambda: model.prepare(images, "", er.INSTRUCTION, size + 28)), "too long for the MLLM"
    )
    model.prepare(images, "", er.INSTRUCTION, size)


def test_a_group_that_fits_keeps_its_size(model: er.EasyRef) -> None:
    assert model.largest_size(picture_sides(), size=100) == 100


def test_memory_can_be_the_limit(model: er.EasyRef) -> None:
    pictures = picture_sides()
    memory = model.budget(pictures, size=112).activation_bytes
    assert model.largest_size(pictures, size=336, memory=memory) < 140
    assert model.largest_size(pictures, size=336, memory=1) is None


def test_no_size_helps_a_prompt_that_is_too_long(model: er.EasyRef) -> None:
    assert model.largest_size(picture_sides(), "a cat " * model.config.max_positions) is None


def test_the_budget_refuses_what_encoding_would(model: er.EasyRef) -> None:
    assert_says(error_of(lambda: model.budget([(64, 64), (1, 0)])), "reference 2 is 1x0 pixels")


# Duplicates


def noise(seed: int, height: int = 90, width: int = 120) -> torch.Tensor:
    """A picture of coarse random squares."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=random)
    return torch.nn.functional.interpolate(coarse, (height, width))[0].movedim(0, -1)


def test_exact_and_near_duplicates_are_told_apart() -> None:
    first, other = noise(0), noise(1)
    group = [first, other, first.clone(), noise(0, 180, 240), other * 0.99, noise(2)]
    found = [(pair.first, pair.second, pair.same) for pair in duplicates(group)]
    assert found == [(1, 3, True), (1, 4, False), (2, 5, False)]


def test_other_pictures_are_no_duplicates() -> None:
    assert duplicates([noise(i) for i in range(6)]) == []
    assert duplicates([torch.zeros(64, 64, 3), torch.ones(64, 64, 3)]) == []


def test_pil_images_are_compared_too() -> None:
    images = golden.references()
    (pair,) = duplicates([images[0], images[1], images[0].convert("RGB")])
    assert (pair.first, pair.second, pair.same) == (1, 3, True)


def test_what_holds_no_picture_is_like_nothing() -> None:
    broken = torch.full((64, 64, 3), torch.nan)
    assert duplicates([broken, broken, torch.zeros(1, 1, 3)]) == []


@pytest.mark.parametrize("shape", [(2000, 3000, 3), (14, 2000, 3), (20, 20, 1), (64, 64, 4)])
def test_a_thumbnail_keeps_the_aspect(shape: tuple[int, ...]) -> None:
    small = thumbnail(torch.rand(shape), 128)
    assert max(small.size) <= 128
    if min(small.size) > 10:
        assert small.width / small.height == pytest.approx(shape[1] / shape[0], rel=0.05)


# Crops


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 200, (50, 0, 150, 100)), (201, 100, (0, 50, 100, 150)), (7, 7, (0, 0, 7, 7))],
)
def test_the_square_in_the_middle(height: int, width: int, box: tuple) -> None:
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
        (marked(100, 200, 0, 0, 20), 2.0, (0, 0, 40, 40)),  # moved in
        (marked(100, 200, 80, 180, 20), 2.0, (160, 60, 200, 100)),
        (marked(100, 200, 40, 90, 20), 9.0, (50, 0, 150, 100)),  # no longer than the shorter side
        (marked(50, 100, 20, 45, 10), 1.0, (90, 40, 110, 60)),  # a mask of half the size
        (torch.ones(64, 64), 1.0, (50, 0, 150, 100)),
    ],
)
def test_the_square_around_a_mask(mask: torch.Tensor, padding: float, box: tuple) -> None:
    assert square_around(mask, 100, 200, padding) == box


def test_a_mask_that_marks_nothing() -> None:
    assert_says(
        error_of(lambda: square_around(torch.zeros(64, 64), 10, 10, 1.0, "The mask of a")),
        "The mask of a marks nothing",
        "Paint it",
    )
