"""Trains a tiny model that ships with the pack, from scratch: `make tiny`, at most two hours on two cores.

Trains the stand-ins for SDXL and Qwen2-VL (recipe.py of easyref_core/tiny, or of its creatures), then EasyRef
in three stages (tiny.yaml or creatures.yaml of easyref_core/training/configs), and prints the results on
held-out groups. Existing results are reused, so an interrupted run continues. `--ship` replaces the shipped
weights by the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import ROOT

GROUPS, SEED = 250, 1000  # number of held-out groups, and their seed


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The training of a world's models: the modules, the stages, and the output."""

    package: str  # with the modules recipe and evaluate
    config: str  # of the three stages
    folder: Path  # default output


RECIPES = {
    "shapes": Recipe("easyref_core.tiny", "tiny.yaml", ROOT / "runs/tiny"),
    "creatures": Recipe("easyref_core.tiny.creatures", "creatures.yaml", ROOT / "runs/creatures"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=RECIPES, default="shapes")
    parser.add_argument("--folder", type=Path, help="output folder (default: runs/tiny or runs/creatures)")
    parser.add_argument("--only-base", action="store_true", help="stop before EasyRef's three stages")
    parser.add_argument("--ship", action="store_true", help="replace the shipped weights by the result")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    complete_cpu_torch()
    recipe = RECIPES[arguments.world]
    folder = arguments.folder or recipe.folder
    train_all(arguments.world, folder, arguments.only_base)
    if arguments.only_base:
        return
    print(importlib.import_module(f"{recipe.package}.evaluate").evaluate(folder, GROUPS, SEED))
    if arguments.ship:
        ship(arguments.world, folder)


def train_all(world: str, folder: Path, only_base: bool = False) -> None:
    """Train the base models and the three stages, and copy the last checkpoint beside the base."""
    from easyref_core.tiny.worlds import BASE, WORLDS
    from easyref_core.training.config import load
    from easyref_core.training.loop import train

    recipe, files = RECIPES[world], WORLDS[world]
    log = logging.getLogger("train_tiny")
    importlib.import_module(f"{recipe.package}.recipe").make_base(folder, log.info)
    if only_base:
        return
    overrides = [f"base={folder / BASE}", f"mllm={folder / files.mllm}", f"output={folder}"]
    for settings in load(ROOT / "easyref_core" / "training" / "configs" / recipe.config, overrides):
        result = train(settings)
    shutil.copy(result, folder / files.easyref)


def ship(world: str, folder: Path) -> None:
    """Copy the files that inference needs."""
    from easyref_core.tiny.worlds import BASE, WORLDS

    files = WORLDS[world]
    shutil.rmtree(files.weights, ignore_errors=True)
    shutil.copytree(folder / BASE, files.weights / BASE)
    # without weights, because the checkpoint contains the fine-tuned MLLM
    shutil.copytree(
        folder / files.mllm, files.weights / files.mllm, ignore=shutil.ignore_patterns("*.safetensors")
    )
    for file in (files.judge, files.easyref):
        shutil.copy(folder / file, files.weights / file)


if __name__ == "__main__":
    main()
