"""accelerate launch -m easyref_core.training CONFIG.yaml [key=value ...]: train the stages a YAML asks for."""

from __future__ import annotations

import argparse
import logging
import sys

from . import config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m easyref_core.training", description=__doc__)
    parser.add_argument("config", help="the YAML file, see easyref_core/training/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the YAML's")
    parser.add_argument("--only", metavar="STAGE", help="of the YAML's stages this one alone; set its start")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    try:
        stages = only(config.load(arguments.config, arguments.overrides), arguments.only)
        for number, settings in enumerate(stages):
            made = [earlier.result for earlier in stages[:number]]
            settings.require_files(made)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    from .loop import train  # here, because a mistake in the settings should not wait for torch

    try:
        for settings in stages:
            log.info("%s -> %s", settings.stage, train(settings))
    except FileNotFoundError as error:  # an MLLM folder without weights, a base without its parts
        sys.exit(str(error))


def only(stages: list[config.Settings], name: str | None) -> list[config.Settings]:
    """The stages of that name, all of them for None. Raises ValueError where there is none."""
    chosen = [settings for settings in stages if name in (None, settings.stage)]
    if not chosen:
        known = ", ".join(settings.stage for settings in stages)
        raise ValueError(f"The YAML has no stage {name!r}; its stages are {known}.")
    return chosen


if __name__ == "__main__":
    main()
