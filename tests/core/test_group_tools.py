"""Instructions, the budget of a group, and duplicates among references."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

import easyref_core as er
from devkit import golden
from easyref_core.inspect.duplicates import duplicates
from easyref_core.mllm.instructions import LANGUAGES, PRESETS

from .errors import assert_says, error_of

# Instructions


def test_general_preset_is_the_authors_instruction() -> None:
    assert next(iter(PRESETS)) == "general"
    assert PRESETS["general"][LANGUAGES[0]] == er.INSTRUCTION == golden.SETTINGS["instruction"]


def test_presets_are_distinct_and_end_in_a_line_break() -> None:
    texts = [PRESETS[name][language] for name, language in itertools.product(PRESETS, LANGUAGES)]
    assert len(set(texts)) == len(texts)
    assert all(text.endswith((":\n", "：\n")) for text in texts)


# Budget


def image_sizes() -> list[tuple[int, int]]:
    return [image.size for image in golden.references()]


@pytest.mark.parametrize("size", [golden.SIZE, 84, 140, 336])
def test_budget_matches_the_prepared_group(model: er.EasyRef, size: int) -> None:
    group = model.prepare(golden.references(), golden.PROMPT, er.INSTRUCTION, size)
    found = model.budget(image_sizes(), golden.PROMPT, size=size)
    assert found.total == group.input_ids.shape[1]
    assert list(found.tokens) == [end - start for start, end in group.spans]
    patch = model.config.patch_size
    assert [[1, height // patch, width // patch] for width, height in found.sides] == group.grid.tolist()
    assert found.limit == model.config.max_positions - model.config.num_tokens


def test_largest_size_is_the_largest_that_encodes(model: er.EasyRef) -> None:
    sides, images = [(1008, 1008)] * 12, [Image.new("RGB", (1008, 1008))] * 12
    size = model.largest_size(sides, size=1008)
    assert size % 28 == 0
    assert 84 < size < 1008
    assert model.budget(sides, size=size).fits()
    assert_says(
        error_of(lambda: model.prepare(images, "", er.INSTRUCTION, size + 28)), "too long for the MLLM"
    )
    model.prepare(images, "", er.INSTRUCTION, size)


def test_largest_size_of_a_group_that_fits(model: er.EasyRef) -> None:
    assert model.largest_size(image_sizes(), size=100) == 100


def test_largest_size_is_limited_by_memory(model: er.EasyRef) -> None:
    memory = model.budget(image_sizes(), size=112).activation_bytes
    assert model.largest_size(image_sizes(), size=336, memory=memory) < 140
    assert model.largest_size(image_sizes(), size=336, memory=1) is None


def test_no_size_fits_a_prompt_that_is_too_long(model: er.EasyRef) -> None:
    assert model.largest_size(image_sizes(), "a cat " * model.config.max_positions) is None


def test_budget_refuses_the_sides_that_encoding_refuses(model: er.EasyRef) -> None:
    assert_says(error_of(lambda: model.budget([(64, 64), (1, 0)])), "reference 2 is 1x0 pixels")


# Duplicates


def noise(seed: int, height: int = 90, width: int = 120) -> torch.Tensor:
    """An image of coarse random squares."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=random)
    return torch.nn.functional.interpolate(coarse, (height, width))[0].movedim(0, -1)


def test_exact_and_near_duplicates_are_distinguished() -> None:
    first, other = noise(0), noise(1)
    group = [first, other, first.clone(), noise(0, 180, 240), other * 0.99, noise(2)]
    found = [(pair.first, pair.second, pair.same) for pair in duplicates(group)]
    assert found == [(1, 3, True), (1, 4, False), (2, 5, False)]


def test_other_images_are_not_duplicates() -> None:
    assert duplicates([noise(i) for i in range(6)]) == []
    assert duplicates([torch.zeros(64, 64, 3), torch.ones(64, 64, 3)]) == []


def test_pil_images_are_compared_too() -> None:
    images = golden.references()
    (pair,) = duplicates([images[0], images[1], images[0].convert("RGB")])
    assert (pair.first, pair.second, pair.same) == (1, 3, True)


def test_unusable_images_are_not_duplicates() -> None:
    broken = torch.full((64, 64, 3), torch.nan)
    assert duplicates([broken, broken, torch.zeros(1, 1, 3)]) == []
