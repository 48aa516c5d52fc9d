"""A mask on the image, at the query tokens of each UNet level."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from easyref_core.unet.masks import Crop, full_crop, token_mask

SIZES = [(16, 16), (125, 169), (13, 40), (1, 3), (128, 128)]  # of the latent: 125 x 169 is 1000 x 1352 pixels


def grid(height: int, width: int, level: int) -> tuple[int, int]:
    """Rows and columns of tokens at a level: halved at each level, rounding up, as SDXL's downsamplers do."""
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


@pytest.mark.parametrize("latent", SIZES)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("mask", [(1, 1), (8, 8), (333, 517)])
def test_ones_and_zeros_are_exact(latent: tuple, level: int, mask: tuple) -> None:
    tokens = grid(*latent, level)
    ones = token_mask(torch.ones(2, *mask), full_crop(*latent), tokens)
    assert ones.shape == (2, tokens[0] * tokens[1])
    assert (ones == 1).all()
    assert (token_mask(torch.zeros(1, *mask), full_crop(*latent), tokens) == 0).all()


@pytest.mark.parametrize("latent", SIZES)
@pytest.mark.parametrize("level", [1, 2])
def test_token_is_the_mean_of_its_latent_pixels(latent: tuple, level: int) -> None:
    """A mask of 3 by 2 pixels for each latent pixel; a token covers 2^level by 2^level latent pixels."""
    mask = torch.rand(1, latent[0] * 3, latent[1] * 2, dtype=torch.float64)
    expected = avg_pool2d(mask, (3 * 2**level, 2 * 2**level), ceil_mode=True)
    tokens = token_mask(mask, full_crop(*latent), grid(*latent, level))
    torch.testing.assert_close(tokens, expected.flatten(1))


def test_mask_smaller_than_the_grid() -> None:
    mask = torch.tensor([[[0.0, 1.0, 0.5]]])
    tokens = token_mask(mask, full_crop(4, 4), (4, 4))[0].reshape(4, 4)
    torch.testing.assert_close(tokens[0].float(), torch.tensor([0.0, 2 / 3, 5 / 6, 0.5]))


def test_crop_gets_its_part_of_the_mask() -> None:
    mask = torch.rand(1, 20, 30)
    full = token_mask(mask, full_crop(20, 30), (20, 30)).reshape(20, 30)
    crop = Crop((20, 30), top=6, left=10, height=8, width=20)
    torch.testing.assert_close(token_mask(mask, crop, (8, 20)).reshape(8, 20), full[6:14, 10:30])


def test_activations_of_another_size_are_divided_evenly() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    tokens = token_mask(mask, full_crop(16, 16), (11, 11))[0].reshape(11, 11)[:, 0]
    assert tokens[:5].tolist() == [1] * 5
    assert tokens[5].item() == pytest.approx(0.5)
    assert tokens[6:].tolist() == [0] * 5


def test_each_frame_has_its_mask() -> None:
    mask = torch.stack([torch.zeros(8, 8), torch.ones(8, 8), torch.full((8, 8), 0.25)])
    tokens = token_mask(mask, full_crop(16, 16), (4, 4))
    assert tokens.unique_consecutive(dim=1)[:, 0].tolist() == [0, 1, 0.25]
