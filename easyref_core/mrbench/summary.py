"""Scores of methods: the mean over a group's seeds, then over the groups of a split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .metrics import Interval, bootstrap, paired_difference, win_rate
from .rows import METRICS, Row, write_csv

SUMMARY = "summary.csv"
ALL = "all"  # both splits, or every category, together
LABELS = {
    "clip_i_target": "CLIP-I, target",
    "clip_i_references": "CLIP-I, references",
    "clip_t_cosine": "CLIP-T, cosine",
    "clip_score": "CLIP-T, CLIPScore",
    "dino_i_target": "DINO-I, target",
    "dino_i_references": "DINO-I, references",
    "shared_right": "shared attributes right",
    "named_right": "prompt attributes right",
}

GroupMeans = Mapping[str, Mapping[str, float]]  # method -> group -> mean over seeds


@dataclass(frozen=True)
class Line:
    """One number of the summary; the fields are the columns of summary.csv."""

    method: str
    split: str
    category: str
    metric: str
    mean: float
    low: float
    high: float
    groups: int
    pictures: int

    @property
    def interval(self) -> Interval:
        return Interval(self.mean, self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """Two methods over the groups that both have."""

    win_rate: Interval
    difference: Interval  # of the means
    groups: int


def group_means(rows: Iterable[Row], metric: str) -> dict[str, dict[str, float]]:
    """{method: {group: mean over its seeds}} of what was measured; methods and groups in sorted order."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row.key):
        if not math.isnan(value := getattr(row, metric)):
            values.setdefault(row.method, {}).setdefault(row.group, []).append(value)
    return {
        method: {group: float(np.mean(v)) for group, v in groups.items()} for method, groups in values.items()
    }


def measured(rows: Sequence[Row]) -> list[str]:
    """Metrics that at least one image has."""
    return [metric for metric in METRICS if any(not math.isnan(getattr(row, metric)) for row in rows)]


def summarise(rows: Sequence[Row], seed: int = 0) -> list[Line]:
    """Summarise every method, split (and both), category (and all) and metric, with its 95 % interval."""
    lines = []
    for split in (*sorted({row.split for row in rows}), ALL):
        of_split = [row for row in rows if split in (row.split, ALL)]
        for category in (ALL, *sorted({row.category for row in of_split})):
            selected = [row for row in of_split if category in (row.category, ALL)]
            counts = Counter(row.method for row in selected)
            lines += [
                Line(
                    *(method, split, category, metric),
                    *bootstrap(np.array(list(means.values())), seed),
                    groups=len(means),
                    pictures=counts[method],
                )
                for metric in measured(selected)
                for method, means in group_means(selected, metric).items()
            ]
    return lines


def compare(means: GroupMeans, first: str, second: str, seed: int = 0) -> Comparison:
    """Compare two methods over the groups that both have; pairs stay together."""
    common = [group for group in means.get(first, {}) if group in means.get(second, {})]
    a, b = (np.array([means[method][group] for group in common]) for method in (first, second))
    return Comparison(win_rate(a, b, seed), paired_difference(a, b, seed), len(common))


def write_summary(folder: Path, rows: Sequence[Row]) -> None:
    """Write summary.csv beside pictures.csv."""
    write_csv(folder / SUMMARY, tuple(Line.__dataclass_fields__), map(asdict, summarise(rows)))
