"""The unconditional side: a black image, or noise in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from devkit import golden
from easyref_core import model as core_model
from easyref_core.mllm.preprocess import black_image
from easyref_core.utils.negative import noise_image


def test_noise_of_strength_0_is_the_black_image(model) -> None:
    assert noise_image(5, 0.0).tobytes() == black_image().tobytes()
    black = model.unconditional(size=golden.SIZE)
    assert model.unconditional(size=golden.SIZE, noise_seed=5, noise_strength=0.0) is black


def test_noise_is_as_bright_as_its_strength() -> None:
    for strength in (1.0, 0.5):
        pixels = np.asarray(noise_image(1, strength)).astype(float)
        assert pixels.max() == pytest.approx(255 * strength, abs=1)
        assert pixels.mean() == pytest.approx(127.5 * strength, abs=0.5)


def test_noise_is_the_seed_s_on_every_machine() -> None:
    assert np.asarray(noise_image(0, 1.0))[0, :2].tolist() == [[95, 130, 194], [217, 207, 235]]
    assert noise_image(0, 1.0).tobytes() != noise_image(1, 1.0).tobytes()
    assert noise_image(2**64 - 1, 1.0).size == (512, 512)


def test_a_strength_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise is 2; wanted 0 \(black\) to 1"):
        noise_image(0, 2.0)


def test_noise_makes_other_tokens_and_says_so(model, uncond) -> None:
    noisy = model.unconditional(size=golden.SIZE, noise_seed=3, noise_strength=0.5)
    assert golden.error(noisy, uncond) > 100 * golden.EXACT
    assert noisy.provenance.how == "noise, seed 3, strength 0.5"
    assert uncond.provenance.how == "black image"
    assert model.unconditional(size=golden.SIZE, noise_seed=3, noise_strength=0.5) is noisy


def test_only_the_latest_are_kept(model, monkeypatch) -> None:
    monkeypatch.setattr(core_model, "KEPT", 2)
    monkeypatch.setattr(model, "_unconditional", {})
    first = model.unconditional(size=golden.SIZE)
    for seed in (1, 2):
        model.unconditional(size=golden.SIZE, noise_seed=seed, noise_strength=1.0)
    again = model.unconditional(size=golden.SIZE)
    assert again is not first
    assert torch.equal(again, first)
