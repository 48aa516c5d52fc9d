"""Trains the arms of a tiny benchmark, each with several seeds: python tools/tiny_arms.py creatures

The base models must have been trained (tools/train_tiny.py --only-base). An arm of a seed is written to
<models>/arms/<arm>@<seed>/; what exists already is skipped, and an interrupted run continues. To use more
cores, run it for other seeds or arms at the same time.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import ROOT

TRAININGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=TRAININGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="training seeds")
    parser.add_argument("--arms", nargs="+", help="arms to train; all by default")
    parser.add_argument("--models", type=Path, help="folder with the base models, and of the results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    complete_cpu_torch()
    models = arguments.models or ROOT / TRAININGS[arguments.world]["models"]
    for seed in arguments.seeds:
        for arm in arguments.arms or TRAININGS[arguments.world]["arms"]:
            train_arm(arguments.world, models, arm, seed)


def train_arm(world: str, models: Path, arm: str, seed: int) -> None:
    """Train the stages of one arm with one seed."""
    from easyref_core.tiny.worlds import BASE, WORLDS
    from easyref_core.training.config import load
    from easyref_core.training.loop import train

    training = TRAININGS[world]
    entry, config = training["arms"][arm], ROOT / training["config"]
    overrides = [f"base={models / BASE}", f"mllm={models / WORLDS[world].mllm}", f"seed={seed}"]
    overrides += entry.get("settings", [])
    stages = load(config, [*overrides, f"output={folder(models, arm, seed)}"])
    if "from" in entry:
        earlier = load(config, [*overrides, f"output={folder(models, entry['from'], seed)}"])
        start = f"stages.{stages[-1].stage}.start={earlier[-2].result}"
        stages = load(config, [*overrides, f"output={folder(models, arm, seed)}", start])[-1:]
    for settings in stages:
        logging.info("%s@%d: %s", arm, seed, train(settings))


def folder(models: Path, arm: str, seed: int) -> Path:
    """Folder of the stages of an arm."""
    return models / "arms" / f"{arm}@{seed}"


if __name__ == "__main__":
    main()
