"""The optimizer and the loss of the tiny VAE."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from easyref_core.tiny.dataset import Dataset
from easyref_core.tiny.optimizer import OneCycleMuon, Training
from easyref_core.tiny.vae import CROP, draw_crops, edge_error

TRAINING = Training(steps=40, batch=1, lr=1e-2, seed=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.inner, self.conv_out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.inner(self.conv_in(images)))


def test_muon_updates_the_matrices_inside_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    model, images = Model(), torch.randn(4, 3, 12, 12)
    optimizer = OneCycleMuon([model], TRAINING, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert [m is model.inner.weight for m in optimizer.matrices] == [True]
    first = model(images).square().mean()
    optimizer.step(first)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    change = (model.inner.weight - before["inner.weight"]).flatten(1)
    values = torch.linalg.svdvals(change)
    assert values.max() / values.min() < 3
    for _ in range(TRAINING.steps - 1):
        optimizer.step(model(images).square().mean())
    assert model(images).square().mean() < first


def test_muon_works_on_weights_in_channels_last() -> None:
    updated = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = Model().to(memory_format=layout)
        OneCycleMuon([model], TRAINING, lr=0.1).step(model(torch.ones(1, 3, 12, 12)).square().mean())
        updated.append(model.inner.weight)
    torch.testing.assert_close(*updated)


@pytest.mark.parametrize(("weight_decay", "bounded"), [(2.0, True), (0.0, False)])
def test_weight_decay_of_muon_bounds_the_singular_values(weight_decay: float, bounded: bool) -> None:
    """By its inverse, times the inexactness of the Newton-Schulz iteration."""
    torch.manual_seed(0)
    model, images = Model(), torch.randn(4, 3, 12, 12)
    optimizer = OneCycleMuon([model], TRAINING, lr=0.2, weight_decay=weight_decay)
    for _ in range(TRAINING.steps):
        optimizer.step(-model(images).mean())
    assert (torch.linalg.matrix_norm(model.inner.weight.flatten(1), 2) < 1.25 / 2.0) == bounded


def test_edges_are_differences_between_neighbouring_pixels() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert edge_error(images + 0.3, images) < 1e-6
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    assert torch.isclose(edge_error(step, torch.zeros_like(step)), torch.tensor(1 / 3))


def test_crops_are_aligned_with_the_latents(dataset: Dataset) -> None:
    pixels = torch.from_numpy(dataset.images[:1]).movedim(-1, 1).float()
    parts = pixels.unfold(2, CROP, 8).unfold(3, CROP, 8).movedim(1, 3).flatten(0, 2)
    for crop in draw_crops(pixels, 4):
        assert any(torch.equal(crop, part) for part in parts)
