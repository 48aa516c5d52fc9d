"""Leak detection: a target among its own references, or an image in both splits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..inspect.duplicates import Pair, find_duplicates, fingerprint
from .images import load_image
from .manifest import Manifest


class Use(NamedTuple):
    """The role of an image in a group."""

    group: str
    split: str
    is_target: bool


def leaks(manifest: Manifest, near: bool = True) -> list[str]:
    """Describe every pair of identical images that leak a target; `near` includes near-duplicates."""
    uses: dict[Path, list[Use]] = {}
    for group in manifest.groups:
        for file in (*group.references, group.target):
            uses.setdefault(file, []).append(Use(group.id, group.split, file == group.target))
    prints = {file: fingerprint(load_image(file)) for file in uses}
    repeated = [Pair(file, file, 0, True) for file, users in uses.items() if len(users) > 1]
    found = []
    for pair in [*repeated, *find_duplicates(prints, near)]:
        both = {tuple(sorted((a, b))) for a in uses[pair.first] for b in uses[pair.second]}
        kinds = {kind for a, b in both if (kind := _leak(a, b))}
        found += [f"{kind}: {pair}" for kind in sorted(kinds)]
    return found


def _leak(a: Use, b: Use) -> str:
    if a.split != b.split:
        return f"held-in and held-out share an image, groups {a.group} and {b.group}"
    if a.group == b.group and a.is_target != b.is_target:
        return f"group {a.group}'s target is among its references"
    return ""
