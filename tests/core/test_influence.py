"""Influence of references, similarity of images, and outliers."""

from __future__ import annotations

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.inspect.influence import (
    center_crop_loss,
    change,
    cosine_matrix,
    find_outlier,
    mean_to_others,
    pooled_features,
    reference_influence,
    robust_z,
)


def similar_features(count: int, outlier: int | None = None) -> torch.Tensor:
    """Similarity of `count` references that differ by little, except for the outlier."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(32, generator=random) + 0.1 * torch.randn(count, 32, generator=random)
    if outlier is not None:
        features[outlier] = torch.randn(32, generator=random)
    return cosine_matrix(features)


def test_change_is_1_minus_the_mean_cosine() -> None:
    tokens = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    assert change(tokens, 3 * tokens) == pytest.approx(0, abs=1e-6)
    assert change(tokens, -tokens) == pytest.approx(2, abs=1e-6)
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert change(tokens, torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])) == pytest.approx(0.5)


def test_mean_similarity_excludes_the_reference_itself() -> None:
    similarity = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
    assert mean_to_others(similarity).tolist() == pytest.approx([0.3, 0.4, 0.5])


def test_robust_z_by_hand() -> None:
    # median 5, deviations 4 1 0 1 2, their median 1
    assert robust_z([1, 4, 5, 6, 7]) == pytest.approx([2.698, 0.6745, 0, -0.6745, -1.349])


def test_equal_references_do_not_divide_by_0() -> None:
    assert find_outlier(torch.ones(5, 5)) == (-1, 0.0)


@pytest.mark.parametrize(
    ("count", "outlier", "reported"),
    [*((5, i, i) for i in range(5)), (6, None, -1), (2, 1, -1), (3, 1, -1)],
)
def test_outlier_is_reported_in_groups_of_4_or_more(count: int, outlier: int | None, reported: int) -> None:
    assert find_outlier(similar_features(count, outlier))[0] == reported


def test_features_depend_on_each_reference_alone(model: er.EasyRef) -> None:
    images = golden.references()

    def features(group: list) -> torch.Tensor:
        return pooled_features(model, model.plan(model.prepare(group, "", "", golden.SIZE), False))

    assert golden.error(features(images), torch.cat([features([image]) for image in images])) <= golden.EXACT


def test_influence_is_the_change_without_each_reference(model: er.EasyRef) -> None:
    images, progress = golden.references(), []
    influence = reference_influence(model, images, "a cat", size=golden.SIZE, progress=progress.append)

    def tokens(group: list) -> torch.Tensor:
        return model.aggregate(model.encode(group, "a cat", size=golden.SIZE))

    expected = [change(tokens(images), tokens(images[:i] + images[i + 1 :])) for i in range(len(images))]
    assert influence.changes == pytest.approx(expected, abs=1e-5)
    assert influence.outlier == -1
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(1)


def test_influence_needs_two_references(model: er.EasyRef) -> None:
    with pytest.raises(ValueError, match="Give it 2 or more"):
        reference_influence(model, golden.references()[:1])


def test_cosine_matrix() -> None:
    cosines = cosine_matrix(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert cosines.flatten().tolist() == pytest.approx([1, 0, 0.5**0.5, 0.5**0.5])


def test_center_crop_loss() -> None:
    assert center_crop_loss(512, 512) == 0
    assert center_crop_loss(512, 1024) == 0.5 == center_crop_loss(1024, 512)
