"""The tiny CLIP and its loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from easyref_core.mrbench.extractors import Clip
from easyref_core.mrbench.methods.ip_adapter import load_image_encoder
from easyref_core.tiny.clip import PROJECTION, contrastive_loss, match_captions, pretrain_clip
from easyref_core.tiny.dataset import Dataset
from easyref_core.tiny.images import NAMES
from easyref_core.tiny.optimizer import Training


def test_a_caption_matches_images_that_agree_in_all_named_attributes() -> None:
    attributes = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]])
    named = np.array([[True, True, False, False, False], [True, True, True, True, True]])
    assert match_captions(attributes, attributes, named).tolist() == [[True, False], [True, True]]


def test_the_loss_is_clips_if_every_image_has_one_caption() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


@pytest.mark.thorough
def test_it_learns_and_loads_as_clip_and_as_image_encoder(dataset: Dataset, tmp_path: Path) -> None:
    lines: list[str] = []
    training = Training(steps=12, batch=16, lr=2e-3, seed=0)
    accuracy = pretrain_clip(dataset, tmp_path / "clip", training, lines.append)
    assert tuple(accuracy) == NAMES
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < losses[0]
    clip = Clip(str(tmp_path / "clip"), local_files_only=True)
    assert clip.texts(["a red circle"]).shape == (1, PROJECTION)
    assert not np.allclose(clip.texts(["a red circle"]), clip.texts(["a blue circle"]))
    assert load_image_encoder(tmp_path / "clip").config.projection_dim == PROJECTION
