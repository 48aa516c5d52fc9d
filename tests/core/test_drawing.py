"""Charts and heat maps: positions, sizes and colours, and that nothing is cut off."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from easyref_core.inspect.charts import Bar, Labels, bar_chart, matrix_chart, stacked_bar
from easyref_core.inspect.colors import (
    BLUE,
    GREEN,
    GREY,
    INFERNO,
    INK,
    MIN_CONTRAST,
    PAPER,
    RED,
    apply_colormap,
    contrast,
    series_colors,
)
from easyref_core.inspect.drawing import (
    caption_grid,
    fit_square,
    font,
    label_grid,
    overlay_heatmap,
    shorten_line,
)
from easyref_core.inspect.scales import MAX_TICKS, Scale, color_bar

LONG = "a label that is far longer than any chart is wide, " * 8
UNIT = Scale("cosine", 0.0, 1.0)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are drawn."""
    drawn, draw = [], ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *args, **named) -> None:
        drawn.append(text)
        draw(self, place, text, *args, **named)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def count_pixels(image: Image.Image, colour: str) -> int:
    return int((np.asarray(image) == ImageColor.getrgb(colour)).all(axis=-1).sum())


def touches_the_edge(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool((edge != ImageColor.getrgb(PAPER)).any())


def charts() -> list[Image.Image]:
    image = Image.new("RGB", (40, 90), "navy")
    values = np.linspace(0, 1, 12).reshape(3, 4)
    rows, columns = Labels("rows", list("xyz")), Labels("columns", list("abcd"))
    many = Labels("steps", [str(i) for i in range(100)])
    blocks = Labels("block of the UNet", ["out 0"] * 11)
    return [
        bar_chart(LONG, [Bar(LONG, 0.5, "0.5", image=image), Bar("b", 1.0, "1.0", True)], UNIT),
        stacked_bar(LONG, {f"part {i}": 1 / 12 for i in range(12)}, "share"),
        matrix_chart("t", values, rows, columns, scale=UNIT, images=[image] * 4, highlight=1),
        matrix_chart("t", np.zeros((11, 100)), blocks, many, scale=Scale("size", 0.0, 0.0)),
        color_bar(Scale("a title that is longer than the bar", 0.0, 0.0123), 420),
        label_grid({"end_percent 0.75": [image, None]}, ["weight 0.4", "weight 1"], 64),
    ]


def test_charts_are_not_cut_off_and_reproducible() -> None:
    assert [touches_the_edge(chart) for chart in charts()] == [False] * 6
    assert [a.tobytes() for a in charts()] == [b.tobytes() for b in charts()]


def test_texts_and_colours_stand_out_from_the_paper() -> None:
    assert min(contrast(ink, PAPER) for ink in (INK, GREY, RED, GREEN)) >= 4.5
    assert min(contrast(colour, PAPER) for colour in series_colors(60)) >= MIN_CONTRAST
    assert contrast("black", "white") == pytest.approx(21)


@pytest.mark.parametrize("count", [8, 9, 40])
def test_series_have_different_colours(count: int) -> None:
    colours = np.array([ImageColor.getrgb(colour) for colour in series_colors(count)])
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 255 * np.eye(count)
    assert distances.min() > 30
    shares = {f"part {i}": 1 / count for i in range(count)}
    assert all(count_pixels(stacked_bar("t", shares, "share"), c) > 100 for c in series_colors(count))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.0, 0.0585, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (0.34, 0.96, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (0.5, 0.5, [0.5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert Scale("", low, high).ticks() == pytest.approx(expected)


def test_ticks_are_few_and_inside() -> None:
    for high in np.geomspace(1e-4, 1e4, 50):
        ticks = Scale("", 0.0, high).ticks()
        assert 2 <= len(ticks) <= MAX_TICKS
        assert 0 <= ticks[0] < ticks[-1] <= high * (1 + 1e-6)


def test_axes_have_titles_and_numbers(texts: list[str]) -> None:
    bar_chart("t", [Bar("a", 1.0, "1")], UNIT)
    assert {"cosine", "0", "0.2", "1"} <= set(texts)
    texts.clear()
    stacked_bar("t", {"a": 1.0}, "share of the attention")
    assert {"share of the attention", "0 %", "60 %", "100 %", "a: 100.0 %"} <= set(texts)
    texts.clear()
    matrix_chart("t", np.zeros((1, 1)), Labels("block", ["mid"]), Labels("step", ["1"]), scale=UNIT)
    assert {"block", "mid", "step", "1", "cosine", "0.5"} <= set(texts)


def test_bars_are_as_long_as_their_values_and_highlights_are_red() -> None:
    chart = bar_chart("t", [Bar("a", 1.0, "1"), Bar("", 0.5, "1", True)], UNIT)
    assert count_pixels(chart, RED) / count_pixels(chart, BLUE) == pytest.approx(0.5, abs=0.01)
    assert count_pixels(bar_chart("t", [Bar("a", -0.5, "-0.5")], UNIT), BLUE) < 100  # drawn as 0


def test_highlight_frames_the_image_the_row_and_the_column() -> None:
    image, labels = Image.new("RGB", (64, 64), "navy"), Labels("", ["", "", ""])
    options = {"scale": UNIT, "images": [image] * 3}
    plain, marked = (
        matrix_chart("t", np.zeros((3, 3)), labels, labels, highlight=i, **options) for i in (-1, 1)
    )
    assert count_pixels(plain, RED) == 0
    rows, columns = np.nonzero((np.asarray(marked) == ImageColor.getrgb(RED)).all(axis=-1))
    assert np.ptp(columns) >= 3 * 64  # the row's frame
    assert np.ptp(rows) >= 4 * 64  # the column's frame and the image above it
    bar = Bar("", 0.0, "", True, image)
    assert count_pixels(bar_chart("t", [bar], UNIT), RED) > 4 * 50


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


@pytest.mark.parametrize("heat", [0.0, 0.5, 1.0])
def test_image_stays_visible_under_a_heatmap(heat: float) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = 255
    overlay = np.asarray(overlay_heatmap(Image.fromarray(stripes), np.full((4, 4), heat)), np.float32)
    assert np.ptp(overlay, axis=1).min() >= 0.49 * 255


def test_label_grid_puts_labels_beside_their_row_and_column(texts: list[str]) -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    grid = label_grid(
        {"end_percent 0.5": [red, blue], "end_percent 1": [blue, None]}, ["weight 0", "weight 1"]
    )
    assert texts == ["weight 0", "weight 1", "end_percent 0.5", "end_percent 1"]
    pixels = np.asarray(grid)
    ink = (pixels > 150).all(axis=-1)
    left = int((pixels[300:] == (0, 0, 255)).all(axis=-1).any(axis=0).argmax())  # of the cells
    assert ink[:, :left].any(axis=1)[300:].any()  # the second row's label, left of it
    assert not ink[left:, left:].any()


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
