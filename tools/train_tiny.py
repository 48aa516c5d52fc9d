"""Trains the tiny model that ships with the pack, from scratch: `make tiny`, at most two hours on two cores.

Trains the stand-ins for SDXL and Qwen2-VL (easyref_core/tiny/recipe.py), then EasyRef in three stages
(easyref_core/training/configs/tiny.yaml), and prints the accuracy on held-out groups. Existing results are
reused, so an interrupted run continues. `--ship` replaces the shipped weights by the result.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import ROOT

TINY = ROOT / "easyref_core" / "tiny"
CONFIG = ROOT / "easyref_core" / "training" / "configs" / "tiny.yaml"
GROUPS, SEED = 250, 1000  # number of held-out groups, and their seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "tiny", help="output folder")
    parser.add_argument("--only-base", action="store_true", help="stop before EasyRef's three stages")
    parser.add_argument("--ship", action="store_true", help="replace the shipped weights by the result")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    complete_cpu_torch()
    train_all(arguments.folder, arguments.only_base)
    if arguments.only_base:
        return
    report(arguments.folder)
    if arguments.ship:
        ship(arguments.folder, TINY / "weights")


def train_all(folder: Path, only_base: bool = False) -> None:
    """Train the base models and the three stages, and copy the last checkpoint beside the base."""
    from easyref_core.tiny.recipe import BASE, EASYREF, MLLM, make_base
    from easyref_core.training.config import load
    from easyref_core.training.loop import train

    log = logging.getLogger("train_tiny")
    make_base(folder, log.info)
    if only_base:
        return
    overrides = [f"base={folder / BASE}", f"mllm={folder / MLLM}", f"output={folder}"]
    for settings in load(CONFIG, overrides):
        result = train(settings)
    shutil.copy(result, folder / EASYREF)


def report(folder: Path) -> None:
    """Print the accuracy without and with the references."""
    from easyref_core.tiny.classifier import load_classifier
    from easyref_core.tiny.evaluate import accuracy_table, render_groups, tiny_methods
    from easyref_core.tiny.groups import evaluation_groups
    from easyref_core.tiny.recipe import CLASSIFIER

    groups = render_groups(list(evaluation_groups(SEED, GROUPS)), SEED)
    print(accuracy_table(tiny_methods(folder), groups, load_classifier(folder / CLASSIFIER)))


def ship(folder: Path, weights: Path) -> None:
    """Copy the files that inference needs."""
    from easyref_core.tiny.recipe import BASE, CLASSIFIER, EASYREF, MLLM

    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(folder / BASE, weights / BASE)
    # without weights, because the checkpoint contains the fine-tuned MLLM
    shutil.copytree(folder / MLLM, weights / MLLM, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (CLASSIFIER, EASYREF):
        shutil.copy(folder / file, weights / file)


if __name__ == "__main__":
    main()
