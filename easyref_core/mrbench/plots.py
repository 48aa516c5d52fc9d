"""Plots of a benchmark's results: score against number of references, and win rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files.atomic_write import atomic_write
from .metrics import bootstrap
from .rows import Row
from .summary import LABELS, compare, group_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too; markers differ besides. Yellow is left out: too pale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*X"
PANEL = (4.2, 3.2)  # inches
COLUMNS = 3
LIMITED = re.compile(r"-\d+-references$")


def plot_references(rows: Sequence[Row], metrics: Sequence[str], methods: Sequence[str], file: Path) -> None:
    """One panel a metric: mean of each method, with its 95 % interval, over groups shown with so many references.

    Pictures painted with a limited number (generate's `<method>-<n>-references`) are points on their method's line.
    """
    rows = [replace(row, method=LIMITED.sub("", row.method)) for row in rows]
    methods = list(dict.fromkeys(LIMITED.sub("", method) for method in methods))
    figure, axes = _panels(len(metrics))
    sizes = sorted({row.references for row in rows})
    for ax, metric in zip(axes, metrics, strict=True):
        of_size = {size: group_means([r for r in rows if r.references == size], metric) for size in sizes}
        for i, method in enumerate(methods):
            values = {
                size: list(means[method].values()) for size, means in of_size.items() if method in means
            }
            _line(ax, values, i, len(methods), method)
        ax.set(title=LABELS[metric], xlabel="references shown", ylabel=_unit(metric), xticks=sizes)
        ax.grid(alpha=0.3)
    _legend(figure, axes[0])
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=120, format="png")


def plot_win_rates(
    rows: Sequence[Row], metrics: Sequence[str], methods: Sequence[str], first: str, file: Path
) -> None:
    """One panel a metric: part of the groups on which `first` is above each other method, with its 95 % interval."""
    others = [method for method in methods if method != first]
    figure, axes = _panels(len(metrics))
    for ax, metric in zip(axes, metrics, strict=True):
        means = group_means(rows, metric)
        ax.axvline(0.5, color="grey", linewidth=1, linestyle="--")
        for i, other in enumerate(others):
            rate, _, groups = compare(means, first, other)
            if groups:
                _bar(ax, i, rate)
        ax.set(
            title=LABELS[metric],
            xlabel=f"win rate of {first}",
            ylabel="against",
            xlim=(0, 1),
            ylim=(len(others) - 0.5, -0.5),
        )
        ax.set_yticks(range(len(others)), others)
        ax.grid(axis="x", alpha=0.3)
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, drawn to files only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


def _line(ax: Axes, values: dict[int, list[float]], i: int, count: int, label: str) -> None:
    if not values:
        return
    means, low, high = np.array([bootstrap(np.array(own)) for own in values.values()]).T
    x = np.array(list(values)) + 0.04 * (i - (count - 1) / 2)  # side by side, so that bars stay apart
    ax.errorbar(
        x,
        means,
        yerr=np.nan_to_num([means - low, high - means]).clip(0),
        color=COLOURS[i % len(COLOURS)],
        marker=MARKERS[i % len(MARKERS)],
        markersize=4,
        linewidth=1.3,
        capsize=2,
        label=label,
    )


def _bar(ax: Axes, i: int, rate: tuple[float, float, float]) -> None:
    mean, low, high = rate
    error = np.nan_to_num([[mean - low], [high - mean]]).clip(0)
    ax.barh(i, mean, color=COLOURS[0], height=0.6, alpha=0.85)
    ax.errorbar(mean, i, xerr=error, color="black", capsize=3, linewidth=1.2)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)


def _unit(metric: str) -> str:
    if metric == "clip_score":
        return "CLIPScore (0 to 2.5)"
    return "part of the attributes" if metric.endswith("_right") else "cosine similarity"
