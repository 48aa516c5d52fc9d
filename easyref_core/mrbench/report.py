"""Markdown report: metrics with intervals, win rates, latency, the paper's numbers, exclusions."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic_write import atomic_write_text
from .latency import read_latencies
from .metrics import Interval
from .paper_numbers import CAVEATS, ROWS, SOURCE
from .plots import plot_references, plot_win_rates
from .rows import EXCLUDED, Row, read_rows
from .score import RESULTS
from .summary import (
    ALL,
    LABELS,
    MIN_TOPICS,
    Line,
    compare,
    few_topics,
    group_means,
    measured,
    pool,
    summarise,
    topics_of,
)
from .training_seeds import pooled_name

REPORT, BY_REFERENCES, WIN_RATES = "report.md", "score_by_references.png", "win_rates.png"
MAX_LISTED = 20  # exclusions in the report; excluded.csv has all
PAPER_TITLES = {
    2: "COCO val, a single reference",
    3: "MRBench",
    4: "reference tokens and where they are inserted",
    5: "aggregation",
}


@dataclass(frozen=True)
class Selection:
    """Rows, methods and metrics of a report, in its order."""

    rows: Sequence[Row]
    methods: Sequence[str]
    metrics: Sequence[str]
    first: str  # the method whose win rates are reported


def write_report(results: Path, first: str | None = None, methods: Sequence[str] = ()) -> Path:
    """Write report.md and its plots into the results folder, and return its path.

    Args:
        first: method whose win rates are reported; by default "easyref" if it has scores, else the first
        method.
        methods: methods to report, in order; by default all.
    """
    selected = _select(read_rows(results), results, first, methods)
    sections = [_head(json.loads((results / RESULTS).read_text(encoding="utf-8")))]
    sections += _tables(summarise(selected.rows), selected)
    if selected.metrics:
        plot_references(selected.rows, selected.metrics, selected.methods, results / BY_REFERENCES)
        sections.append(
            f"## Score against number of references\n\n![Score against references]({BY_REFERENCES})"
        )
    if selected.metrics and len(selected.methods) > 1:
        others = [method for method in selected.methods if method != selected.first]
        plot_win_rates(selected.rows, selected.metrics, selected.first, others, results / WIN_RATES)
        sections.append(_wins(selected, others))
    sections += [*_latency(results, selected), _paper(), _excluded(results / EXCLUDED)]
    atomic_write_text(results / REPORT, "\n\n".join(sections) + "\n")
    return results / REPORT


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def cell(interval: Interval) -> str:
    """A mean with its interval; the mean alone if one group gives no interval, "-" if there is no mean."""
    if math.isnan(interval.mean):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _select(rows: Sequence[Row], results: Path, first: str | None, methods: Sequence[str]) -> Selection:
    if not rows:
        raise FileNotFoundError(
            f"{results} has no scored image. Run `python -m easyref_core.mrbench score` first."
        )
    known = sorted({pooled_name(row.method) for row in rows})
    if unknown := [method for method in methods if method not in known]:
        raise ValueError(f"No scores of {', '.join(unknown)}; there are {', '.join(known)}.")
    methods = list(methods) or known
    if first is not None and first not in methods:
        raise ValueError(f"No scores of {first}; there are {', '.join(methods)}.")
    rows = [row for row in rows if pooled_name(row.method) in methods]
    first = first or ("easyref" if "easyref" in methods else methods[0])
    return Selection(rows, methods, measured(rows), first)


def _head(facts: dict[str, Any]) -> str:
    models = [f"- {kind}: {identity or 'none'}" for kind, identity in facts["extractors"].items()]
    return "\n\n".join(
        [
            f"# {facts['benchmark']} (drawn with seed {facts['seed']})",
            f"{facts['pictures']} images scored, {facts['groups']} groups, {facts['excluded']} exclusions.",
            "Models that the images were scored with:\n\n" + "\n".join(models),
            "Means over a group's seeds, then over groups and training seeds, with 95 % percentile "
            "bootstrap intervals over topics and training seeds, resampled independently. Intervals over "
            f"fewer than {MIN_TOPICS} topics, or over few training seeds, are too narrow. CLIP-I and DINO-I "
            "are cosines; CLIP-T is given as cosine and as CLIPScore, 2.5 times that.",
        ]
    )


def _tables(lines: Sequence[Line], selected: Selection) -> list[str]:
    """A table for each split, then one for each category if there are several."""
    sections, warnings = [], few_topics(selected.rows)
    for split in dict.fromkeys(line.split for line in lines if line.split != ALL):
        by_category: dict[str, list[Line]] = {}
        for line in lines:
            if line.split == split:
                by_category.setdefault(line.category, []).append(line)
        warning = f"**{warnings[split]}**\n\n" if split in warnings else ""
        sections.append(f"## {split}\n\n{warning}" + _table(by_category.pop(ALL), selected))
        if len(by_category) > 1:
            sections += [
                f"### {split}, {category}\n\n" + _table(lines_of, selected)
                for category, lines_of in by_category.items()
            ]
    return sections


def _table(lines: Iterable[Line], selected: Selection) -> str:
    """Methods x metrics, with numbers of groups and topics, and of training seeds if a method has several."""
    known = {(line.method, line.metric): line for line in lines}
    has_seeds = any(line.training_seeds > 1 for line in known.values())
    counted = ["groups", "topics", *(["training seeds"] if has_seeds else [])]
    body = []
    for method in selected.methods:
        lines_of = [known.get((method, name)) for name in selected.metrics]
        counts = [
            str(max((getattr(line, name.replace(" ", "_")) for line in lines_of if line), default=0))
            for name in counted
        ]
        body.append([method, *counts, *(cell(line.interval) if line else "-" for line in lines_of)])
    return table(["method", *counted, *(LABELS[name] for name in selected.metrics)], body)


def _wins(selected: Selection, others: Sequence[str]) -> str:
    """Win rates and differences of one method against every other: a table for each split."""
    text = (
        f"Fraction of the groups in which {selected.first} scores higher than the other method (a tie counts "
        "one half), and the mean difference, over all groups that both have and over those of each category. "
        "Both are resampled by the same topics, and each by its own training seeds. The plot is of all "
        "splits together."
    )
    sections = [f"## Win rates of {selected.first}", text, f"![Win rates]({WIN_RATES})"]
    for split in sorted({row.split for row in selected.rows}):
        rows = [row for row in selected.rows if row.split == split]
        sections.append(
            f"### {split}, {selected.first} against the others\n\n" + _wins_table(rows, selected, others)
        )
    return "\n\n".join(sections)


def _wins_table(rows: Sequence[Row], selected: Selection, others: Sequence[str]) -> str:
    """Metrics and methods x win rate and mean difference, and the difference in each category of several."""
    topics, categories = topics_of(rows), sorted({row.category for row in rows})
    parts = {"mean difference": rows}
    if len(categories) > 1:
        parts |= {category: [row for row in rows if row.category == category] for category in categories}
    body = []
    for name in selected.metrics:
        scores = [pool(group_means(part, name)) for part in parts.values()]
        for other in others:
            results = [compare(of_part, selected.first, other, topics) for of_part in scores]
            counted = [LABELS[name], other, str(results[0].groups), cell(results[0].win_rate)]
            body.append([*counted, *(cell(result.difference) for result in results)])
    return table(["metric", "against", "common groups", "win rate", *parts], body)


def _latency(results: Path, selected: Selection) -> list[str]:
    """Seconds by number of references; nothing if `generate` has measured none."""
    latencies = [one for one in read_latencies(results) if one.method in selected.methods]
    if not latencies:
        return []
    sizes = sorted({one.references for one in latencies})
    cells = {
        (one.method, one.device, one.references): f"{one.prepare:.3f} + {one.paint:.3f}" for one in latencies
    }
    body = [
        [method, device, *(cells.get((method, device, size), "-") for size in sizes)]
        for method in selected.methods
        for device in sorted({one.device for one in latencies if one.method == method})
    ]
    text = (
        "Mean seconds of preparing a group (tokens, embeddings, or the training of its LoRA) + of painting "
        "one image in a batch. Loading is not counted, nor a process's first batch where there are others."
    )
    head = ["method", "device", *(f"{size} reference{'s' * (size > 1)}" for size in sizes)]
    return [f"## Latency by number of references\n\n{text}\n\n{table(head, body)}"]


def _paper() -> str:
    """The paper's tables, and the reasons why they are not comparable."""
    parts = [f"## The paper's numbers ({SOURCE})", "Not comparable with the numbers above:"]
    parts.append("\n".join(f"- {caveat}" for caveat in CAVEATS))
    for number, title in PAPER_TITLES.items():
        rows = [row for row in ROWS if row.table == number]
        body = [[row.split, row.method, *map(_number, row.scores), row.note] for row in rows]
        parts.append(f"Table {number}, {title}:")
        parts.append(table(["split", "method", "CLIP-I", "CLIP-T", "DINO-I", "note"], body))
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _excluded(file: Path) -> str:
    with file.open(newline="", encoding="utf-8") as content:
        lines = [f"- {line['what']} {line['name']}: {line['reason']}" for line in csv.DictReader(content)]
    more = [f"- ... and {len(lines) - MAX_LISTED} more, in {EXCLUDED}"] if len(lines) > MAX_LISTED else []
    return "\n".join([f"## Excluded: {len(lines)}", "", *(lines[:MAX_LISTED] or ["Nothing."]), *more])
