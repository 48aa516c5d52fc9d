"""Charts and heat maps: what is drawn where, and that nothing is cut off. What they look like was looked at."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from easyref_core.inspect.charts import BLUE, RED, Bar, bar_chart, matrix_chart, parts_chart
from easyref_core.inspect.drawing import (
    INFERNO,
    caption_grid,
    fit_square,
    font,
    heat_colours,
    overlay_heatmap,
    shortened,
)

LONG = "a label that is far longer than any chart is wide, " * 8


def pixels_of(picture: Image.Image, colour: str) -> int:
    return int((np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=-1).sum())


def touches_the_edge(picture: Image.Image) -> bool:
    grey = np.asarray(picture.convert("L"))
    return bool((np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]) < 250).any())


def charts() -> list[Image.Image]:
    picture = Image.new("RGB", (40, 90), "navy")
    values = np.linspace(0, 1, 12).reshape(3, 4)
    return [
        bar_chart(LONG, [Bar(LONG, 0.5, "0.5", picture=picture), Bar("b", 1.0, "1.0", True)]),
        parts_chart(LONG, {f"part {i}": 1 / 12 for i in range(12)}),
        matrix_chart("t", values, ["x", "y", "z"], list("abcd"), 0, 1, "note", [picture] * 4, 1),
        matrix_chart("t", np.zeros((11, 100)), ["out 0"] * 11, [str(i) for i in range(100)], 0, 0),
    ]


def test_nothing_is_cut_off_at_the_edges() -> None:
    assert [touches_the_edge(chart) for chart in charts()] == [False] * 4


def test_drawn_twice_is_the_same() -> None:
    assert [a.tobytes() for a in charts()] == [b.tobytes() for b in charts()]


def test_bars_are_as_long_as_their_values_and_the_marked_is_red() -> None:
    chart = bar_chart("t", [Bar("a", 1.0, "1"), Bar("b", 0.5, "1", True)])
    assert pixels_of(chart, RED) / pixels_of(chart, BLUE) == pytest.approx(0.5, abs=0.01)


def test_bar_below_0_is_drawn_as_0() -> None:
    assert pixels_of(bar_chart("t", [Bar("a", -0.5, "-0.5")], high=1.0), BLUE) < 100


def test_heat_goes_from_the_first_colour_to_the_last() -> None:
    assert heat_colours(np.array([0.0, 1.0])).tolist() == [list(INFERNO[0]), list(INFERNO[-1])]
    brightness = heat_colours(np.linspace(0, 1, 50)).sum(axis=-1, dtype=int)
    assert (np.diff(brightness) >= 0).all()


def test_heat_lies_where_the_map_is_hot_and_keeps_the_aspect() -> None:
    heat = np.zeros((2, 4))
    heat[0, 3] = 1
    found = overlay_heatmap(Image.new("RGB", (80, 40), "grey"), heat)
    brightness = np.asarray(found).sum(axis=-1, dtype=int)
    assert found.size == (80, 40)
    assert brightness[2, 77] > 2 * brightness[37, 2]


def test_text_is_shortened_to_its_width() -> None:
    assert shortened("short", 200, 18) == "short"
    cut = shortened(LONG, 200, 18)
    assert cut.endswith("…")
    assert font(18).getlength(cut) <= 200


@pytest.mark.parametrize("count", [1, 4, 5])
def test_captions_wrap(count: int) -> None:
    sheet = caption_grid([Image.new("RGB", (30, 60))] * count, ["caption"] * count, cell=64)
    assert sheet.height > 2 * 64 if count > 4 else sheet.height < 2 * 64


def test_small_pictures_grow_sharply_and_large_ones_shrink_smoothly() -> None:
    checks = Image.fromarray(np.indices((64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert len(fit_square(checks.crop((0, 0, 2, 2)), 64).getcolors()) == 2
    assert np.ptp(np.asarray(fit_square(checks, 8)).astype(int)) < 100
