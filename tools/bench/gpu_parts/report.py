"""The report of all parts: Markdown with the goals first, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.gpu_parts.runner import Outcome
from tools.bench.report import entry, machine_list, table

TITLE = "# EasyRef on this machine's device"
GOALS = (
    "Goals: cold encode at most 2 times the roofline, a step with references at most 1.02 times one without, "
    "a prompt edit of 8 references of 1024 x 1024 at most 60 ms from images to tokens."
)
SMALL = (
    "**Small sizes:** the golden model and a small UNet took the place of the full-size ones. The figures "
    "show that the command works; the goals of speed are not judged."
)
EXPLAINED = (
    "Two ways under comparison alternate in one process; a ratio is the median of the pairs' ratios, the "
    "spread their quartiles. Weights are random. The golden data are results of the authors' code."
)


def markdown(machine: Mapping[str, str], outcomes: Sequence[Outcome], options: GpuOptions) -> str:
    """The machine, the figures that have a limit, and each part's table."""
    limited = [row for outcome in outcomes for row in outcome.rows if row.wanted]
    judged = table(limited) if limited else "No figure with a limit was measured."
    blocks = [TITLE, GOALS, *([SMALL] if options.quick else []), EXPLAINED, machine_list(machine)]
    blocks += ["## Figures with a limit", judged]
    for outcome in outcomes:
        blocks.append(f"## {outcome.part} ({outcome.seconds:.0f} s)")
        blocks += [outcome.problem] if outcome.problem else []
        blocks += [f"```\n{outcome.details}\n```"] if outcome.details else []
        blocks += [table(outcome.rows)] if outcome.rows else []
    return "\n\n".join(blocks) + "\n"


def as_json(machine: Mapping[str, str], outcomes: Sequence[Outcome], options: GpuOptions) -> str:
    """{"machine": {...}, "quick": bool, "parts": [{"part", "seconds", "problem", "rows": [entry, ...]}]}"""
    parts = [
        {
            "part": outcome.part,
            "seconds": round(outcome.seconds, 1),
            "problem": outcome.problem,
            "rows": [entry(row) for row in outcome.rows],
        }
        for outcome in outcomes
    ]
    report = {"machine": dict(machine), "quick": options.quick, "parts": parts}
    return json.dumps(report, indent=1) + "\n"
