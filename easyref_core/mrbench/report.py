"""The results in Markdown: every method and metric with its interval, win rates, the paper's numbers, what is missing."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files.atomic_write import atomic_write_text
from .metrics import Interval
from .paper_numbers import CAVEATS, ROWS, SOURCE, PaperRow, row_of
from .plots import plot_references, plot_win_rates
from .rows import EXCLUDED, Row, read_rows
from .score import RESULTS
from .summary import ALL, LABELS, Line, compare, group_means, measured, summarise

REPORT, BY_REFERENCES, WIN_RATES = "report.md", "score_by_references.png", "win_rates.png"
LISTED = 20  # exclusions named in the report; excluded.csv has all
PAPER_TITLES = {3: "MRBench", 4: "reference tokens and where they are inserted", 5: "aggregation"}


def write_report(results: Path, first: str | None = None, methods: Sequence[str] = ()) -> Path:
    """report.md and its plots in the results folder.

    first: the method whose win rates are shown; "easyref" where there is one, else the first. methods: which, in which
    order; all of them where none is named.
    """
    rows = read_rows(results)
    if not rows:
        raise FileNotFoundError(
            f"{results} has no scored picture. Run `python -m easyref_core.mrbench score` first."
        )
    methods = _methods(rows, methods)
    first = _first(first, methods)
    rows = [row for row in rows if row.method in methods]
    names = measured(rows)
    sections = [_head(json.loads((results / RESULTS).read_text(encoding="utf-8")))]
    sections += _tables(summarise(rows), methods, names)
    if names:
        plot_references(rows, names, methods, results / BY_REFERENCES)
        sections.append(
            f"## Score against number of references\n\n![Score against references]({BY_REFERENCES})"
        )
    if names and len(methods) > 1:
        plot_win_rates(rows, names, methods, first, results / WIN_RATES)
        sections.append(_wins(rows, methods, names, first))
    sections += [_paper(), _excluded(results / EXCLUDED)]
    atomic_write_text(results / REPORT, "\n\n".join(sections) + "\n")
    return results / REPORT


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def cell(interval: Interval) -> str:
    """A mean and its interval; the mean alone where one group gives no interval."""
    if math.isnan(interval.mean):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _methods(rows: Iterable[Row], wanted: Sequence[str]) -> list[str]:
    found = sorted({row.method for row in rows})
    if unknown := [method for method in wanted if method not in found]:
        raise ValueError(f"No scores of {', '.join(unknown)}; there are {', '.join(found)}.")
    return list(wanted) or found


def _first(wanted: str | None, methods: Sequence[str]) -> str:
    if wanted is not None and wanted not in methods:
        raise ValueError(f"No scores of {wanted}; there are {', '.join(methods)}.")
    return wanted or ("easyref" if "easyref" in methods else methods[0])


def _head(facts: dict[str, Any]) -> str:
    models = [f"- {kind}: {identity or 'none'}" for kind, identity in facts["extractors"].items()]
    counts = (
        f"{facts['pictures']} pictures scored, {facts['groups']} groups, {facts['excluded']} things excluded."
    )
    explained = (
        "Means over a group's seeds, then over groups, with 95 % percentile bootstrap intervals over groups. "
        "CLIP-I and DINO-I are cosines; CLIP-T is given as cosine and as CLIPScore, 2.5 times that."
    )
    title = f"# {facts['benchmark']} (drawn with seed {facts['seed']})"
    return "\n\n".join(
        [title, counts, "Models the pictures were read with:\n\n" + "\n".join(models), explained]
    )


def _tables(lines: Sequence[Line], methods: Sequence[str], names: Sequence[str]) -> list[str]:
    """A table for each split, then one for each category where there are several."""
    sections = []
    for split in dict.fromkeys(line.split for line in lines if line.split != ALL):
        of_split = [line for line in lines if line.split == split]
        sections.append(
            f"## {split}\n\n" + _table([x for x in of_split if x.category == ALL], methods, names, split)
        )
        categories = [category for category in dict.fromkeys(x.category for x in of_split) if category != ALL]
        if len(categories) > 1:
            for category in categories:
                own = [line for line in of_split if line.category == category]
                sections.append(f"### {split}, {category}\n\n" + _table(own, methods, names))
    return sections


def _table(
    lines: Iterable[Line], methods: Sequence[str], names: Sequence[str], split: str | None = None
) -> str:
    """Methods x metrics; with a split, the paper's row beside each method that has one."""
    known = {(line.method, line.metric): line for line in lines}
    head = ["method", "groups", *(LABELS[name] for name in names)]
    head += [f"paper ({SOURCE}): CLIP-I, CLIP-T, DINO-I"] if split else []
    body = []
    for method in methods:
        own = [known.get((method, name)) for name in names]
        groups = max((line.groups for line in own if line), default=0)
        cells = [cell(Interval(line.mean, line.low, line.high)) if line else "-" for line in own]
        paper = [_paper_cell(row_of(method, split))] if split else []
        body.append([method, str(groups), *cells, *paper])
    return table(head, body)


def _paper_cell(row: PaperRow | None) -> str:
    if row is None:
        return "-"
    numbers = ", ".join(f"{number:.3f}" for number in row[3:6] if number is not None)
    return f"{numbers or row.note} (Table {row.table}, {row.method}; not comparable)"


def _wins(rows: Sequence[Row], methods: Sequence[str], names: Sequence[str], first: str) -> str:
    """Win rates and differences of one method against every other, over the groups that both have."""
    body = []
    for name in names:
        means = group_means(rows, name)
        for other in (method for method in methods if method != first):
            rate, difference, groups = compare(means, first, other)
            body.append([LABELS[name], other, str(groups), cell(rate), cell(difference)])
    head = ["metric", "against", "common groups", "win rate", "mean difference"]
    text = f"Part of the groups on which {first} is above the other method (a tie counts one half), and by how much."
    return f"## Win rates of {first}\n\n{text}\n\n![Win rates]({WIN_RATES})\n\n{table(head, body)}"


def _paper() -> str:
    """The paper's tables, and why they are not comparable."""
    parts = [f"## The paper's numbers ({SOURCE})", "Not comparable with the numbers above:"]
    parts.append("\n".join(f"- {caveat}" for caveat in CAVEATS))
    for number, title in PAPER_TITLES.items():
        own = [row for row in ROWS if row.table == number]
        body = [[row.split, row.method, *map(_number, row[3:6]), row.note] for row in own]
        parts.append(f"Table {number}, {title}:")
        parts.append(table(["split", "method", "CLIP-I", "CLIP-T", "DINO-I", "note"], body))
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _excluded(file: Path) -> str:
    with file.open(newline="", encoding="utf-8") as content:
        lines = [f"- {line['what']} {line['name']}: {line['reason']}" for line in csv.DictReader(content)]
    more = [f"- ... and {len(lines) - LISTED} more, in {EXCLUDED}"] if len(lines) > LISTED else []
    return "\n".join([f"## Excluded: {len(lines)}", "", *(lines[:LISTED] or ["Nothing."]), *more])
