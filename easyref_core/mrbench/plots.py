"""Plots of a benchmark's results: score against number of references, and win rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files.atomic_write import atomic_write
from .rows import Row
from .summary import LABELS, compare, group_means, interval, pool, topics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers, without its pale yellow, then others that differ from it.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
    *("#8C564B", "#9467BD", "#7F7F7F", "#E41A1C", "#808000", "#1F3A93", "#00CED1"),
    *("#FF69B4", "#A6D854", "#5E2129", "#C8A2C8", "#B8860B", "#004D40"),
)
# Told apart in grey too: 13 markers and 4 line styles have 52 different pairs.
MARKERS = "osD^vP*X<>phd"
LINE_STYLES = ("-", "--", "-.", ":")
PANEL = (4.2, 3.2)  # inches
COLUMNS = 3
# References between the error bars of two methods, so that they do not overlap, and of all methods together.
OFFSET, MAX_SPREAD = 0.04, 0.5
LEGEND_LINE = 0.22  # inches
LIMITED = re.compile(r"-\d+-references$")


def plot_references(rows: Sequence[Row], metrics: Sequence[str], methods: Sequence[str], file: Path) -> None:
    """One panel per metric: mean and 95 % interval of each method against the number of references.

    Images generated with a limited number (generate's `<method>-<n>-references`) are points of their method.
    """
    rows = [replace(row, method=LIMITED.sub("", row.method)) for row in rows]
    methods = list(dict.fromkeys(LIMITED.sub("", method) for method in methods))
    figure, axes = _panels(len(metrics))
    sizes, topics = sorted({row.references for row in rows}), topics_of(rows)
    for ax, metric in zip(axes, metrics, strict=True):
        by_size = {
            size: pool(group_means([r for r in rows if r.references == size], metric)) for size in sizes
        }
        offset = min(OFFSET, MAX_SPREAD / len(methods))
        for i, method in enumerate(methods):
            intervals = {
                size: interval(scores[method], topics) for size, scores in by_size.items() if method in scores
            }
            if not intervals:
                continue
            means, low, high = np.array(list(intervals.values())).T
            ax.errorbar(
                np.array(list(intervals)) + offset * (i - (len(methods) - 1) / 2),
                means,
                yerr=np.nan_to_num([means - low, high - means]).clip(0),
                markersize=4,
                linewidth=1.3,
                capsize=2,
                label=method,
                **style(i),
            )
        ax.set(title=LABELS[metric], xlabel="number of references", ylabel=_unit(metric), xticks=sizes)
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        columns = min(COLUMNS, len(metrics)) + 1
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + LEGEND_LINE * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    _save(figure, file)


def plot_win_rates(
    rows: Sequence[Row], metrics: Sequence[str], first: str, others: Sequence[str], file: Path
) -> None:
    """One panel per metric: win rate of `first` against each other method, with its 95 % interval."""
    figure, axes = _panels(len(metrics))
    topics = topics_of(rows)
    for ax, metric in zip(axes, metrics, strict=True):
        scores = pool(group_means(rows, metric))
        ax.axvline(0.5, color="grey", linewidth=1, linestyle="--")
        for i, other in enumerate(others):
            result = compare(scores, first, other, topics)
            if result.groups:
                mean, low, high = result.win_rate
                error = np.nan_to_num([[mean - low], [high - mean]]).clip(0)
                ax.barh(i, mean, color=COLOURS[0], height=0.6, alpha=0.85)
                ax.errorbar(mean, i, xerr=error, color="black", capsize=3, linewidth=1.2)
        ax.set(title=LABELS[metric], xlabel=f"win rate of {first}", ylabel="against")
        ax.set(xlim=(0, 1), ylim=(len(others) - 0.5, -0.5))
        ax.set_yticks(range(len(others)), others)
        ax.grid(axis="x", alpha=0.3)
    _save(figure, file)


def style(number: int) -> dict[str, str]:
    """Colour, marker and line style of a method: 20 different colours, 52 pairs of marker and line style."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
    }


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels that is drawn to files only."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


def _save(figure: Figure, file: Path) -> None:
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _unit(metric: str) -> str:
    if metric == "clip_score":
        return "CLIPScore (0 to 2.5)"
    return "fraction of the attributes" if metric.endswith("_right") else "cosine similarity"
