"""accelerate launch -m easyref_core.training CONFIG.yaml [key=value ...]: train the stages of a YAML."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import traceback
from pathlib import Path

from . import config

PACKAGE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m easyref_core.training", description=__doc__)
    parser.add_argument("config", help="the YAML file, see easyref_core/training/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the YAML's")
    parser.add_argument("--only", metavar="STAGE", help="train only this stage of the YAML; set its start")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    try:
        run_stages(select(config.load(arguments.config, arguments.overrides), arguments.only), log)
    except (ValueError, OSError) as error:
        message = expected_message(error)
        if message is None:
            raise
        sys.exit(message)


def run_stages(stages: list[config.Settings], log: logging.Logger) -> None:
    """Train the stages in order, after checking the files and the data of all of them."""
    for number, settings in enumerate(stages):
        settings.require_files([earlier.result for earlier in stages[:number]])
    # imported after the files are checked, because it loads torch's and accelerate's distributed parts
    from .loop import train
    from .run import open_dataset

    datasets = [open_dataset(settings) for settings in stages]
    for settings, dataset in zip(stages, datasets, strict=True):
        log.info("%s -> %s", settings.stage, train(settings, dataset))


def expected_message(error: ValueError | OSError) -> str | None:
    """Text of an error that the user can repair; None for a bug, whose traceback is needed.

    Expected are files that cannot be read and ValueErrors that this package raises itself. PyTorch reraises
    those of data loading processes with their traceback as text.
    """
    text, file = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
    if "\nOriginal Traceback" in text:
        file = re.findall(r'File "(.+?)", line', text)[-1]
        text = re.split(r"\n[\w.]*Error: ", text)[-1].rstrip()
    known = isinstance(error, OSError) or Path(file).resolve().is_relative_to(PACKAGE)
    return text if known else None


def select(stages: list[config.Settings], name: str | None) -> list[config.Settings]:
    """Return the stages of that name, or all for None. Raises ValueError if there are none."""
    chosen = [settings for settings in stages if name in (None, settings.stage)]
    if not chosen:
        known = ", ".join(settings.stage for settings in stages)
        raise ValueError(f"The YAML has no stage {name!r}; its stages are {known}.")
    return chosen


if __name__ == "__main__":
    main()
