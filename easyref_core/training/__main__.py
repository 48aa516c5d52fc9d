"""python -m easyref_core.training [COMMAND] CONFIG.yaml [key=value ...]: train the stages of a YAML.

Training runs in as many processes as `accelerate launch` starts. COMMAND is one of

    check         only read the rows; no model is loaded
    export        write the checkpoint of a saved state
    precompute    store the outputs of the frozen models, which training then does not need
    shards        store the rows and their images in Parquet shards, for data.stream
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from . import config
from .parquet_shards import ROW_GROUP_SIZE, SHARD_ROWS

PACKAGE = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else None
    parser = argparse.ArgumentParser(
        prog=f"python -m easyref_core.training{f' {name}' if name else ''}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the YAML file, see easyref_core/training/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the YAML's")
    parser.add_argument("--only", metavar="STAGE", help="only this stage of the YAML; set its start")
    if name == "export":
        parser.add_argument("--state", type=int, metavar="UPDATE", help="default: the newest saved state")
        parser.add_argument("--to", type=Path, metavar="FILE", help="default: easyref-UPDATE.safetensors")
        parser.add_argument("--raw", action="store_true", help="the weights in place of their moving average")
    if name == "precompute":
        parser.add_argument("--parts", type=lambda text: text.split(","), help="of latents,texts,contexts")
    if name == "shards":
        parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
        for flag, value, text in (
            ("--shard-rows", SHARD_ROWS, "rows of a shard"),
            ("--row-group-size", ROW_GROUP_SIZE, "rows that are read together"),
        ):
            parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{text}: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("easyref_core")
    log.setLevel(logging.INFO)
    try:
        stages = select(config.load(options.config, options.overrides), options.only)
        COMMANDS.get(name, lambda stages, _, log: run_stages(stages, log))(stages, options, log)
    except (ValueError, OSError) as error:
        message = expected_message(error)
        if message is None:
            raise
        sys.exit(message)


def check_rows(stages: list[config.Settings], _: argparse.Namespace, log: logging.Logger) -> None:
    """Read the rows of the stages, or the manifests of their shards, and log their number."""
    from .rows import count_rows
    from .stream import describe_sources

    for settings in stages:
        stream = settings.data.stream
        log.info("%s: %s", settings.stage, describe_sources(stream) if stream else count_rows(settings.data))


def export_state(stages: list[config.Settings], options: argparse.Namespace, log: logging.Logger) -> None:
    """Write the checkpoint of a saved state of one stage."""
    from .export import export

    settings = only_stage(stages)
    settings.require_files()
    result = export(settings, options.state, options.to, options.raw)
    log.info("%s -> %s", settings.stage, result)


def precompute_parts(stages: list[config.Settings], options: argparse.Namespace, log: logging.Logger) -> None:
    """Store the outputs of the frozen models for the stages."""
    for settings in stages:
        settings.require_files()
    from .loop import make_accelerator
    from .precompute import precompute

    for settings in stages:
        precompute(settings, make_accelerator(1), options.parts)
        log.info("%s -> %s", settings.stage, settings.precomputed)


def make_shards(stages: list[config.Settings], options: argparse.Namespace, log: logging.Logger) -> None:
    """Store the rows of one stage in shards."""
    from .parquet_shards import write_shards
    from .rows import valid_rows

    settings = only_stage(stages)
    data = settings.data
    if data.rows is None:
        raise ValueError("data.rows is not set. Set data.rows and data.root to the rows to store in shards.")
    rows = valid_rows(data.rows, data.root, data.skip_rows, data.thorough, data.apply_exif)
    shards = write_shards(rows, data.root, options.to, options.shard_rows, options.row_group_size)
    log.info("%d rows in %d shards -> %s", sum(shards.rows), len(shards.rows), options.to)


Command = Callable[[list[config.Settings], argparse.Namespace, logging.Logger], None]
COMMANDS: dict[str, Command] = {
    "check": check_rows,
    "export": export_state,
    "precompute": precompute_parts,
    "shards": make_shards,
}


def only_stage(stages: list[config.Settings]) -> config.Settings:
    """The stage of a list of one. Raises ValueError for several."""
    if len(stages) > 1:
        known = ", ".join(settings.stage for settings in stages)
        raise ValueError(f"The YAML has several stages ({known}). Choose one with --only STAGE.")
    return stages[0]


def run_stages(stages: list[config.Settings], log: logging.Logger) -> None:
    """Train the stages in order, after checking the files and the data of all of them."""
    for number, settings in enumerate(stages):
        settings.require_files([earlier.result for earlier in stages[:number]])
    # imported after the files are checked, because it loads torch's and accelerate's distributed parts
    from .loop import open_validation, train
    from .run import open_dataset
    from .signals import Stopped

    datasets = [open_dataset(settings) for settings in stages]
    for settings in stages:
        open_validation(settings)
    for settings, dataset in zip(stages, datasets, strict=True):
        try:
            log.info("%s -> %s", settings.stage, train(settings, dataset))
        except Stopped as stopped:
            log.warning("%s", stopped)
            break


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
