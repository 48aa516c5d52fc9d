"""Crops are squares that lie inside the picture."""

from __future__ import annotations

import pytest
import torch

from easyref_core.crop import Square, fitted, mask_square, middle_square


def marked(height, width, top, left, bottom, right):
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


def test_middle():
    assert middle_square(60, 100) == Square(0, 20, 60)
    assert middle_square(100, 60) == Square(20, 0, 60)


def test_around_a_mask_with_room():
    assert mask_square(marked(100, 200, 40, 100, 60, 110), 0.0) == Square(40, 95, 20)
    assert mask_square(marked(100, 200, 40, 100, 60, 110), 0.5) == Square(30, 85, 40)


def test_it_moves_inside_and_never_grows_beyond_the_picture():
    assert mask_square(marked(100, 200, 0, 0, 20, 20), 0.5) == Square(0, 0, 40)
    square = mask_square(marked(100, 200, 0, 0, 100, 200), 2.0)
    assert square == Square(0, 50, 100)


def test_the_crop_is_of_the_picture():
    picture = torch.rand(1, 100, 200, 3)
    assert torch.equal(Square(10, 20, 30).of(picture), picture[:, 10:40, 20:50])


def test_masks_of_other_sizes_and_empty_ones():
    assert fitted(marked(50, 100, 0, 0, 25, 50), 100, 200).mean() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="marks nothing"):
        mask_square(torch.zeros(10, 10), 0.0)
