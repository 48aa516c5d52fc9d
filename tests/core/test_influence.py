"""What each reference does: change without it, likeness, and the one that does not belong."""

from __future__ import annotations

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.inspect.consistency import cropped_share, similarity
from easyref_core.inspect.influence import (
    change,
    find_outlier,
    likeness,
    mean_to_others,
    pooled_features,
    robust_z,
)


def near(count: int, odd: int | None = None) -> torch.Tensor:
    """Similarity of `count` references that are all alike within a little, but for one."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(32, generator=random) + 0.1 * torch.randn(count, 32, generator=random)
    if odd is not None:
        features[odd] = torch.randn(32, generator=random)
    return likeness(features)


def test_change_is_0_without_change_and_2_at_the_opposite() -> None:
    tokens = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    assert change(tokens, 3 * tokens) == pytest.approx(0, abs=1e-6)
    assert change(tokens, -tokens) == pytest.approx(2, abs=1e-6)


def test_change_is_the_mean_over_tokens() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert change(tokens, torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])) == pytest.approx(0.5)


def test_mean_similarity_leaves_oneself_out() -> None:
    similar = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
    assert mean_to_others(similar).tolist() == pytest.approx([0.3, 0.4, 0.5])


def test_robust_z_by_hand() -> None:
    # median 5, deviations 4 1 0 1 2, their median 1
    assert robust_z([1, 4, 5, 6, 7]) == pytest.approx([2.698, 0.6745, 0, -0.6745, -1.349])


def test_equal_references_do_not_divide_by_0() -> None:
    assert find_outlier(torch.ones(5, 5)) == (-1, 0.0)


@pytest.mark.parametrize("odd", range(5))
def test_odd_one_is_found(odd: int) -> None:
    assert find_outlier(near(5, odd))[0] == odd


def test_none_stands_out_of_a_group_that_is_alike() -> None:
    assert find_outlier(near(6))[0] == -1


@pytest.mark.parametrize("count", [2, 3])
def test_none_is_named_of_a_few(count: int) -> None:
    assert find_outlier(near(count, 1))[0] == -1


def test_features_are_of_each_reference_alone(model: er.EasyRef) -> None:
    images = golden.references()

    def features(of: list) -> torch.Tensor:
        return pooled_features(model, model.plan(model.prepare(of, "", "", golden.SIZE), False))

    assert golden.error(features(images), torch.cat([features([image]) for image in images])) <= golden.EXACT


def test_similarity_is_the_cosine() -> None:
    found = similarity(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert found.flatten().tolist() == pytest.approx([1, 0, 0.5**0.5, 0.5**0.5])


def test_crop_of_a_square_loses_nothing() -> None:
    assert cropped_share(512, 512) == 0
    assert cropped_share(512, 1024) == 0.5 == cropped_share(1024, 512)
