"""Pictures that give an answer away: a target among its references, one picture in both splits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..inspect.duplicates import Pair, find_duplicates, fingerprint
from .images import open_picture

if TYPE_CHECKING:
    from .manifest import Manifest


def leaks(manifest: Manifest, near: bool = True) -> list[str]:
    """Every pair of pictures that gives an answer away: a group's target among its references, one picture in both splits."""
    owners: dict[Path, list[tuple[str, str, bool]]] = {}  # file -> (group, split, is it the target)
    for group in manifest.groups:
        for file in (*group.references, group.target):
            owners.setdefault(file, []).append((group.id, group.split, file == group.target))
    prints = {file: fingerprint(open_picture(file)) for file in owners}
    twice = [Pair(file, file, 0, True) for file, uses in owners.items() if len(uses) > 1]
    found = []
    for pair in [*twice, *find_duplicates(prints, near)]:
        uses = {tuple(sorted((a, b))) for a in owners[pair.first] for b in owners[pair.second]}
        kinds = {kind for a, b in uses if (kind := _leak(a, b))}
        found += [f"{kind}: {pair}" for kind in sorted(kinds)]
    return found


def _leak(a: tuple[str, str, bool], b: tuple[str, str, bool]) -> str:
    if a[1] != b[1]:
        return f"held-in and held-out share a picture, groups {a[0]} and {b[0]}"
    if a[0] == b[0] and a[2] != b[2]:
        return f"group {a[0]}'s target is among its references"
    return ""
