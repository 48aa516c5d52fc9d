"""The tiny CLIP and the pictures that the tiny baselines learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from easyref_core.mrbench.extractors import Clip
from easyref_core.mrbench.methods.ip_adapter import load_image_encoder
from easyref_core.tiny.clip import PROJECTION, contrastive_loss, pretrain_image_encoder, true_of
from easyref_core.tiny.dataset import Pool, combination
from easyref_core.tiny.images import every_picture, held_out, render


@pytest.fixture(scope="module")
def pool() -> Pool:
    """One picture of every combination."""
    every = every_picture()
    kept = every[~held_out(every)]
    where = np.full(len(every), -1)
    where[combination(kept)] = np.arange(len(kept))
    return Pool(render(kept, np.random.default_rng(0)), kept, 1, where)


def test_a_caption_is_true_of_what_agrees_in_all_that_it_names() -> None:
    pictures = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]])
    named = np.array([[True, True, False, False, False], [True, True, True, True, True]])
    assert true_of(pictures, pictures, named).tolist() == [[True, False], [True, True]]


def test_the_loss_is_clip_s_where_every_picture_has_one_caption() -> None:
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    own = torch.arange(5)
    wanted = (
        torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)
    ) / 2
    torch.testing.assert_close(contrastive_loss(scores, torch.eye(5, dtype=torch.bool)), wanted)


def test_it_learns_and_loads_as_clip_and_as_image_encoder(pool: Pool, tmp_path: Path) -> None:
    said: list[str] = []
    right = pretrain_image_encoder(pool, tmp_path / "clip", 12, 16, 2e-3, 0, said.append)
    assert set(right) == {"shape", "colour", "texture", "background", "place"}
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said]
    assert losses[-1] < losses[0]
    clip = Clip(str(tmp_path / "clip"), local_files_only=True)
    assert clip.texts(["a red circle"]).shape == (1, PROJECTION)
    assert not np.allclose(clip.texts(["a red circle"]), clip.texts(["a blue circle"]))
    assert load_image_encoder(tmp_path / "clip").config.projection_dim == PROJECTION
