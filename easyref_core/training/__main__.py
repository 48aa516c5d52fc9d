"""accelerate launch -m easyref_core.training CONFIG.yaml [key=value ...]: train the stages of a YAML."""

from __future__ import annotations

import argparse
import logging
import sys

from . import config


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
        stages = select(config.load(arguments.config, arguments.overrides), arguments.only)
        for number, settings in enumerate(stages):
            settings.require_files([earlier.result for earlier in stages[:number]])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    # imported after the settings are validated, because it loads torch
    from ..utils.finite import NotFiniteError
    from .loop import train

    try:
        for settings in stages:
            log.info("%s -> %s", settings.stage, train(settings))
    # an MLLM folder without weights or an incomplete base; a run that diverged
    except (FileNotFoundError, NotFiniteError) as error:
        sys.exit(str(error))


def select(stages: list[config.Settings], name: str | None) -> list[config.Settings]:
    """Return the stages of that name, or all for None. Raises ValueError if there are none."""
    chosen = [settings for settings in stages if name in (None, settings.stage)]
    if not chosen:
        known = ", ".join(settings.stage for settings in stages)
        raise ValueError(f"The YAML has no stage {name!r}; its stages are {known}.")
    return chosen


if __name__ == "__main__":
    main()
