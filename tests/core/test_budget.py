"""The budget counted from sizes is what encoding then takes."""

from __future__ import annotations

import pytest
from PIL import Image

from easyref_core.budget import budget, largest_size
from easyref_core.model import load
from easyref_core.preprocess import preprocess

from .golden import CHECKPOINT, MLLM

SIZES = [(512, 512), (300, 900), (64, 40), (1080, 1920)]


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, MLLM)


@pytest.mark.parametrize("size", [84, 168, 336])
def test_tokens_are_those_of_the_preprocessed_group(model, size):
    pictures = [Image.new("RGB", (width, height)) for height, width in SIZES]
    _, grid = preprocess(pictures, model.config, size)
    found = budget(SIZES, model.config, size)
    assert list(found.image_tokens) == (grid.prod(dim=1) // model.config.merge_size**2).tolist()
    patch = model.config.patch_size
    assert [[h // patch, w // patch] for h, w in found.sizes] == grid[:, 1:].tolist()


def test_context_is_as_long_as_counted(model):
    pictures = [Image.new("RGB", (width, height)) for height, width in SIZES]
    length = model.prepare(pictures, "", "", 84).input_ids.shape[1]
    text = length - sum(budget(SIZES, model.config, 84).image_tokens) - 2 * len(SIZES)
    assert budget(SIZES, model.config, 84, text=text).tokens == length


def test_more_references_take_more(model):
    one, two = (budget(SIZES[:1] * n, model.config, 336) for n in (1, 2))
    assert two.operations > one.operations
    assert two.memory > one.memory


def test_the_largest_size_that_fits_is_found(model):
    limit = model.config.max_positions - model.config.num_tokens
    many = [(512, 512)] * (limit // 150)
    size = largest_size(many, model.config, 1008)
    assert size < 1008
    assert budget(many, model.config, size).fits
    unit = model.config.pixels_per_token
    assert not budget(many, model.config, (size // unit + 1) * unit).fits
    assert largest_size(many[:1], model.config, 336) == 336
    assert largest_size([(512, 512)] * limit, model.config, 336) is None
