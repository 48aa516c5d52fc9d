"""Charts and heat maps: positions, sizes and colours, and that nothing is cut off."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from easyref_core.inspect.charts import BLUE, RED, Bar, bar_chart, matrix_chart, stacked_bar
from easyref_core.inspect.drawing import (
    INFERNO,
    apply_colormap,
    caption_grid,
    fit_square,
    font,
    overlay_heatmap,
    shorten_line,
)

LONG = "a label that is far longer than any chart is wide, " * 8


def count_pixels(image: Image.Image, colour: str) -> int:
    return int((np.asarray(image) == ImageColor.getrgb(colour)).all(axis=-1).sum())


def touches_the_edge(image: Image.Image) -> bool:
    grey = np.asarray(image.convert("L"))
    return bool((np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]) < 250).any())


def charts() -> list[Image.Image]:
    image = Image.new("RGB", (40, 90), "navy")
    values, bounds = np.linspace(0, 1, 12).reshape(3, 4), {"low": 0, "high": 1}
    many = [str(i) for i in range(100)]
    return [
        bar_chart(LONG, [Bar(LONG, 0.5, "0.5", image=image), Bar("b", 1.0, "1.0", True)]),
        stacked_bar(LONG, {f"part {i}": 1 / 12 for i in range(12)}),
        matrix_chart(
            "t", values, list("xyz"), list("abcd"), note="note", images=[image] * 4, highlight=1, **bounds
        ),
        matrix_chart("t", np.zeros((11, 100)), ["out 0"] * 11, many, low=0, high=0),
    ]


def test_charts_are_not_cut_off_and_reproducible() -> None:
    assert [touches_the_edge(chart) for chart in charts()] == [False] * 4
    assert [a.tobytes() for a in charts()] == [b.tobytes() for b in charts()]


def test_bars_are_as_long_as_their_values_and_highlights_are_red() -> None:
    chart = bar_chart("t", [Bar("a", 1.0, "1"), Bar("b", 0.5, "1", True)])
    assert count_pixels(chart, RED) / count_pixels(chart, BLUE) == pytest.approx(0.5, abs=0.01)
    assert count_pixels(bar_chart("t", [Bar("a", -0.5, "-0.5")], high=1.0), BLUE) < 100  # drawn as 0


def test_colormap_runs_from_dark_to_bright() -> None:
    assert apply_colormap(np.array([0.0, 1.0])).tolist() == [list(INFERNO[0]), list(INFERNO[-1])]
    brightness = apply_colormap(np.linspace(0, 1, 50)).sum(axis=-1, dtype=int)
    assert (np.diff(brightness) >= 0).all()


def test_heatmap_is_bright_where_it_is_hot_and_keeps_the_aspect() -> None:
    heat = np.zeros((2, 4))
    heat[0, 3] = 1
    overlay = overlay_heatmap(Image.new("RGB", (80, 40), "grey"), heat)
    brightness = np.asarray(overlay).sum(axis=-1, dtype=int)
    assert overlay.size == (80, 40)
    assert brightness[2, 77] > 2 * brightness[37, 2]


def test_text_is_shortened_to_its_width() -> None:
    assert shorten_line("short", 200, 18) == "short"
    text = shorten_line(LONG, 200, 18)
    assert text.endswith("…")
    assert font(18).getlength(text) <= 200


@pytest.mark.parametrize("count", [1, 4, 5])
def test_captions_wrap(count: int) -> None:
    sheet = caption_grid([Image.new("RGB", (30, 60))] * count, ["caption"] * count, cell=64)
    assert sheet.height > 2 * 64 if count > 4 else sheet.height < 2 * 64


def test_small_images_grow_sharply_and_large_ones_shrink_smoothly() -> None:
    checks = Image.fromarray(np.indices((64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert len(fit_square(checks.crop((0, 0, 2, 2)), 64).getcolors()) == 2
    assert np.ptp(np.asarray(fit_square(checks, 8)).astype(int)) < 100
