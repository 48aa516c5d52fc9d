"""MRBench on the creatures: groups of held-in creatures, which trainings have seen, and of new ones.

python -m easyref_core.tiny.creatures.benchmark runs/creatures/benchmark
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...mrbench.builder import from_groups
from ...mrbench.manifest import SPLITS, Manifest
from ..benchmark import run_command
from .examples import COUNT, DATASET_SEED
from .groups import Group, render_groups
from .identities import draw_identities

GROUPS, SEED = 200, 3000  # of each split


def make_benchmark(folder: Path, count: int = GROUPS, seed: int = SEED) -> Manifest:
    """Write `count` groups of each split under `folder`; the category is the number of references."""
    return from_groups(folder, _groups(count, seed), name="creatures", seed=seed)


def _groups(count: int, seed: int) -> Iterator[tuple[str, str, Group]]:
    trained = draw_identities(np.random.default_rng(DATASET_SEED), COUNT)  # as draw_dataset does first
    picked = np.arange(seed, seed + count) % COUNT  # seeds that are `count` apart have different creatures
    identities = {
        "held-in": trained[picked],
        "held-out": draw_identities(np.random.default_rng(seed), count),
    }
    for number, split in enumerate(SPLITS):
        for group in render_groups(identities[split], seed + number):
            yield split, f"{len(group.references)} references", group


if __name__ == "__main__":
    run_command("easyref_core.tiny.creatures.benchmark", __doc__, make_benchmark, (GROUPS, SEED))
