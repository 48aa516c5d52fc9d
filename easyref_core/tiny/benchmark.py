"""MRBench on the procedural dataset: groups with held-in and with held-out targets.

python -m easyref_core.tiny.benchmark runs/tiny/benchmark
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from ..mrbench.builder import from_groups
from ..mrbench.manifest import SPLITS, Manifest
from .evaluate import Group, render_groups
from .groups import evaluation_groups

GROUPS, SEED = 250, 2000  # of each split

MakeBenchmark = Callable[[Path, int, int], Manifest]


def make_benchmark(folder: Path, count: int = GROUPS, seed: int = SEED) -> Manifest:
    """Write `count` groups of each split under `folder`; the category tells if there is an outsider."""
    return from_groups(folder, _groups(count, seed), name="procedural", seed=seed)


def _groups(count: int, seed: int) -> Iterator[tuple[str, str, Group]]:
    for number, split in enumerate(SPLITS):
        plans = list(evaluation_groups(seed + number, count, target_held_out=split == "held-out"))
        for group in render_groups(plans, seed + number):
            category = "all belong" if group.plan.outsider is None else "one does not belong"
            yield split, category, group


def run_command(prog: str, description: str, make: MakeBenchmark, defaults: tuple[int, int]) -> None:
    """Make the benchmark of a tiny world by the command line. defaults: groups of each split, and seed."""
    groups, seed = defaults
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for manifest.json and the images")
    parser.add_argument("--groups", type=int, default=groups, help="groups of each split")
    parser.add_argument("--seed", type=int, default=seed, help="the seed that groups are drawn with")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.groups, arguments.seed)


if __name__ == "__main__":
    run_command("easyref_core.tiny.benchmark", __doc__, make_benchmark, (GROUPS, SEED))
