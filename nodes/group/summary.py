"""Texts and previews about a group of references, shared by the nodes that make, measure and encode one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ...easyref_core.inspect.duplicates import duplicates
from ..host import preview
from ..host.notes import duplicate_notes, mask_notes

if TYPE_CHECKING:
    from ...easyref_core.mllm.budget import Budget
    from ..host.images import ReferenceGroup

MIN_ADVISED = 3  # references, as the authors advise


def group_preview(group: ReferenceGroup, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the ui of a node that made a group: contact sheet, number of references, notes, duplicates."""
    duplicate_lines = duplicate_notes(duplicates([reference[0] for reference in group]))
    lines = [
        count_text(len(group)),
        *notes,
        *small_group_notes(len(group)),
        *mask_notes(group.masks),
        *duplicate_lines,
    ]
    return {**preview.images(group, group.masks), **preview.text("\n".join(lines))}


def count_text(references: int) -> str:
    """Return "1 reference", "4 references" and so on."""
    return f"{references} reference{'' if references == 1 else 's'}"


def small_group_notes(references: int) -> list[str]:
    """Return a warning if a group is smaller than advised."""
    if references >= MIN_ADVISED:
        return []
    return [
        f"Warning: {count_text(references)}. EasyRef works best with {MIN_ADVISED} or more that share one "
        "thing."
    ]


def size_lines(budget: Budget) -> list[str]:
    """Return the pixels and tokens of each reference; consecutive references of one size share a line."""
    lines, first = [], 1
    for (width, height), run in groupby(budget.sides):
        last = first + len(list(run)) - 1
        which = f"reference {first}" if first == last else f"references {first}-{last}"
        lines.append(f"{which}: {width}x{height} pixels, {budget.tokens[first - 1]} tokens")
        first = last + 1
    return lines
