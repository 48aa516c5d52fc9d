"""Makes the tiny model that ships with the pack, from nothing: `make tiny`, at most two hours on two cores.

First what stands for SDXL and Qwen2-VL (easyref_core/tiny/recipe.py), then the project's own three stages
(easyref_core/training/configs/tiny.yaml), then the accuracy on held-out groups. What is there already is kept, so a run
that was stopped goes on. `--ship` puts the result in the place of the shipped weights.
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
GROUPS, SEED = 250, 1000  # held-out groups that are painted, and where their draw starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "tiny", help="where everything goes")
    parser.add_argument("--only-base", action="store_true", help="stop before EasyRef's three stages")
    parser.add_argument("--ship", action="store_true", help="replace the shipped weights by the result")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    complete_cpu_torch()
    make(arguments.folder, arguments.only_base)
    if arguments.only_base:
        return
    report(arguments.folder)
    if arguments.ship:
        ship(arguments.folder, TINY / "weights")


def make(folder: Path, only_base: bool = False) -> None:
    """The base models and the three stages; the last stage's checkpoint is copied beside the base."""
    from easyref_core.tiny.recipe import BASE, EASYREF, MLLM, make_base
    from easyref_core.training.config import load
    from easyref_core.training.loop import train

    log = logging.getLogger("train_tiny")
    make_base(folder, log.info)
    if only_base:
        return
    places = [f"base={folder / BASE}", f"mllm={folder / MLLM}", f"output={folder}"]
    for settings in load(CONFIG, places):
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
    """Copy what users need, and nothing of the training."""
    from easyref_core.tiny.recipe import BASE, CLASSIFIER, EASYREF, MLLM

    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(folder / BASE, weights / BASE)
    # the fine-tuned MLLM is in the checkpoint
    shutil.copytree(folder / MLLM, weights / MLLM, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (CLASSIFIER, EASYREF):
        shutil.copy(folder / file, weights / file)


if __name__ == "__main__":
    main()
