"""Similarity to a group, and its sheets."""

from __future__ import annotations

import torch
from PIL import Image

from easyref_core.consistency import bars, cosines
from easyref_core.visualize import labelled_grid


def test_cosines_are_of_every_pair_and_ignore_length():
    pictures, references = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert torch.allclose(cosines(pictures, references), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))


def test_bars_grow_with_their_values_and_the_largest_is_marked():
    plot = bars([0.2, 0.9], ["a", "b"], "t")
    green = [plot.getpixel((x, 12 + 24 * 2 + 10)) == (47, 125, 79) for x in range(plot.width)]
    blue = [plot.getpixel((x, 12 + 24 + 10)) == (122, 156, 198) for x in range(plot.width)]
    assert sum(green) > 4 * sum(blue) > 0


def test_a_grid_has_each_picture_in_its_row_and_column():
    pictures = [Image.new("RGB", (20, 10), (i * 40, 0, 0)) for i in range(6)]
    sheet = labelled_grid(pictures, ["r1", "r2"], ["a", "b", "c"])
    left = sheet.width - 3 * 32
    for i in range(6):
        row, column = divmod(i, 3)
        assert sheet.getpixel((left + column * 32 + 10, 38 + row * 22 + 5)) == (i * 40, 0, 0)
