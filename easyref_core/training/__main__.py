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
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    try:
        stages = config.load(arguments.config, arguments.overrides)
        for number, settings in enumerate(stages):
            made = [earlier.result for earlier in stages[:number]]
            settings.require_files(made)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    from .loop import train  # here, because a mistake in the settings should not wait for torch

    for settings in stages:
        log.info("%s -> %s", settings.stage, train(settings))


if __name__ == "__main__":
    main()
