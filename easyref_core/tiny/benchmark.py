"""The procedural instance of MRBench: groups of the tiny world, with targets as in training and with held-out ones.

python -m easyref_core.tiny.benchmark runs/tiny_benchmark
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..mrbench.builder import from_groups
from ..mrbench.manifest import SPLITS, Manifest
from .evaluate import Group, draw
from .groups import groups_to_judge

GROUPS, SEED = 250, 2000  # of each split


def make_benchmark(folder: Path, count: int = GROUPS, seed: int = SEED) -> Manifest:
    """Write `count` groups of each split under `folder`. Category: whether one reference does not belong."""
    return from_groups(folder, _groups(count, seed), name="procedural", seed=seed)


def _groups(count: int, seed: int) -> Iterator[tuple[str, str, Group]]:
    for number, split in enumerate(SPLITS):
        plans = list(groups_to_judge(seed + number, count, target_held_out=split == "held-out"))
        for group in draw(plans, seed + number):
            category = "all belong" if group.plan.outsider is None else "one does not belong"
            yield split, category, group


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m easyref_core.tiny.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where manifest.json and the pictures go")
    make_benchmark(parser.parse_args().folder)


if __name__ == "__main__":
    main()
