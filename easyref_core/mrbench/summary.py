"""Scores of methods: means over a group's seeds, then over the groups of a split and training seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from .metrics import Floats, Interval, bootstrap, paired_difference, win_rate
from .rows import METRICS, Row, write_csv
from .training_seeds import pooled_name

SUMMARY = "summary.csv"
MIN_TOPICS = 20  # below it, percentile intervals over topics are clearly too narrow
ALL = "all"  # both splits, or every category, together
LABELS = {
    "clip_i_target": "CLIP-I, target",
    "clip_i_references": "CLIP-I, references",
    "clip_t_cosine": "CLIP-T, cosine",
    "clip_score": "CLIP-T, CLIPScore",
    "dino_i_target": "DINO-I, target",
    "dino_i_references": "DINO-I, references",
    "subject_target": "subject, target",
    "subject_references": "subject, references",
    "shared_right": "shared attributes right",
    "named_right": "prompt attributes right",
}

GroupMeans = Mapping[str, Mapping[str, float]]  # entry -> group -> mean over sampling seeds
Topics = Mapping[str, str]  # group -> topic


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
    topics: int
    training_seeds: int
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


class Scores(NamedTuple):
    """Scores of a method: means over sampling seeds, of the groups that every training seed has."""

    groups: tuple[str, ...]
    values: Floats  # (training seeds, groups)

    def of(self, groups: Sequence[str]) -> Floats:
        """The columns of some groups."""
        return self.values[:, [self.groups.index(group) for group in groups]]


class HasTopic(Protocol):
    """A row of scores, or a group of a manifest."""

    split: str
    topic: str


def group_means(rows: Iterable[Row], metric: str) -> dict[str, dict[str, float]]:
    """{entry: {group: mean over its sampling seeds}} of what was measured, both in sorted order."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row.key):
        if not math.isnan(value := getattr(row, metric)):
            values.setdefault(row.method, {}).setdefault(row.group, []).append(value)
    return {
        method: {group: float(np.mean(v)) for group, v in groups.items()} for method, groups in values.items()
    }


def pool(means: GroupMeans) -> dict[str, Scores]:
    """Scores of each method; its entries <method>@<training seed> are the rows of its values."""
    entries: dict[str, list[Mapping[str, float]]] = {}
    for entry, groups in means.items():
        entries.setdefault(pooled_name(entry), []).append(groups)
    pooled = {}
    for method, seeds in entries.items():
        common = tuple(group for group in seeds[0] if all(group in groups for groups in seeds))
        values = [[groups[group] for group in common] for groups in seeds]
        pooled[method] = Scores(common, np.array(values, dtype=np.float64).reshape(len(seeds), -1))
    return pooled


def topics_of(rows: Iterable[Row]) -> dict[str, str]:
    """The topic of each group."""
    return {row.group: row.topic for row in rows}


def interval(scores: Scores, topics: Topics, seed: int = 0) -> Interval:
    """Mean of a method and its interval over topics and training seeds."""
    return bootstrap(scores.values, [topics[group] for group in scores.groups], seed)


def few_topics(items: Iterable[HasTopic]) -> dict[str, str]:
    """A warning for each split with fewer than MIN_TOPICS topics."""
    splits: dict[str, set[str]] = {}
    for item in items:
        splits.setdefault(item.split, set()).add(item.topic)
    return {
        split: f"{split} has {len(topics)} topics; with fewer than {MIN_TOPICS} its intervals are too narrow."
        for split, topics in sorted(splits.items())
        if len(topics) < MIN_TOPICS
    }


def measured(rows: Sequence[Row]) -> list[str]:
    """Metrics that at least one image has."""
    return [metric for metric in METRICS if any(not math.isnan(getattr(row, metric)) for row in rows)]


def summarise(rows: Sequence[Row], seed: int = 0) -> list[Line]:
    """Summarise every method, split (and both), category (and all) and metric, with its 95 % interval."""
    lines, topics = [], topics_of(rows)
    for split in (*sorted({row.split for row in rows}), ALL):
        of_split = [row for row in rows if split in (row.split, ALL)]
        for category in (ALL, *sorted({row.category for row in of_split})):
            selected = [row for row in of_split if category in (row.category, ALL)]
            counts = Counter(pooled_name(row.method) for row in selected)
            lines += [
                Line(
                    *(method, split, category, metric),
                    *interval(scores, topics, seed),
                    groups=len(scores.groups),
                    topics=len({topics[group] for group in scores.groups}),
                    training_seeds=len(scores.values),
                    pictures=counts[method],
                )
                for metric in measured(selected)
                for method, scores in pool(group_means(selected, metric)).items()
            ]
    return lines


def compare(
    scores: Mapping[str, Scores], first: str, second: str, topics: Topics, seed: int = 0
) -> Comparison:
    """Compare two methods over the groups that both have; pairs stay together."""
    if first not in scores or second not in scores:
        nothing = bootstrap(np.array([]))
        return Comparison(nothing, nothing, 0)
    common = [group for group in scores[first].groups if group in set(scores[second].groups)]
    a, b = scores[first].of(common), scores[second].of(common)
    drawn = [topics[group] for group in common]
    return Comparison(win_rate(a, b, drawn, seed), paired_difference(a, b, drawn, seed), len(common))


def write_summary(folder: Path, rows: Sequence[Row]) -> None:
    """Write summary.csv beside pictures.csv."""
    write_csv(folder / SUMMARY, tuple(Line.__dataclass_fields__), map(asdict, summarise(rows)))
