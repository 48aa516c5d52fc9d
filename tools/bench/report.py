"""Rows as a Markdown table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.bench.rows import Row

HEAD = ("what", "value", "ratio", "spread", "wanted", "met")
MET = {True: "yes", False: "**no**", None: ""}


def markdown(machine: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The machine, and one line a row."""
    lines = [HEAD, ("---", "---:", "---:", "---:", "---:", "---"), *map(_cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(f"- {name}: {text}" for name, text in machine.items()) + f"\n\n{table}"


def write_json(file: Path, machine: Mapping[str, str], rows: Sequence[Row]) -> None:
    """{"machine": {...}, "rows": [{"name", "value", "unit", "ratio", "spread", "wanted", "met"}, ...]}"""
    made = [
        dataclasses.asdict(row) | {"wanted": row.wanted and str(row.wanted), "met": row.met} for row in rows
    ]
    file.write_text(json.dumps({"machine": dict(machine), "rows": made}, indent=1) + "\n", encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.spread is None else f"{row.spread[0]:.4g} to {row.spread[1]:.4g}"
    return (
        row.name,
        f"{row.value:.4g} {row.unit}",
        "" if row.ratio is None else f"{row.ratio:.4g}",
        spread,
        "" if row.wanted is None else str(row.wanted),
        MET[row.met],
    )
