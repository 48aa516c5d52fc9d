"""Command line of the benchmark: build, check, generate, score, report. See `--help` of each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .captions import NO_CATEGORY
from .images import describe
from .manifest import SPLITS, read_manifest, usable, write_manifest

if TYPE_CHECKING:
    from .manifest import Manifest
    from .summary import HasTopic


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an input error is printed in one line, without a traceback."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed) or 0
    except (ValueError, FileNotFoundError) as error:
        _print(f"mrbench: {error}", sys.stderr)
        return 1


def build(parsed: argparse.Namespace) -> None:
    """Build a manifest from a folder of captioned images."""
    from .builder import MANIFEST, from_folder
    from .training_rows import write_training_rows

    manifest, exclusions, training = from_folder(
        parsed.folder,
        seed=parsed.seed,
        held_out=parsed.held_out,
        references=tuple(parsed.references),
        drop_duplicates=parsed.drop_duplicates,
        category=parsed.category,
        name=parsed.name,
        single=parsed.single,
    )
    file = parsed.manifest or parsed.folder / MANIFEST
    write_manifest(manifest, file)
    _print(f"Wrote {file}: {_counts(manifest)}")
    for rows in write_training_rows(file.parent, training):
        _print(f"Wrote {rows}: training rows of the held-in topics, without the benchmark's targets")
    _print(describe(exclusions))
    _warn(manifest.groups)


def check(parsed: argparse.Namespace) -> int:
    """Check a manifest for broken images and for images that leak an answer."""
    from .leaks import leaks

    manifest, exclusions = usable(read_manifest(parsed.manifest))
    found = leaks(manifest, near=not parsed.identical_only)
    _print(f"{parsed.manifest}: {_counts(manifest)}")
    _print(describe(exclusions))
    _print("\n".join([f"{len(found)} leaks:", *(f"  {leak}" for leak in found)]) if found else "No leak.")
    return int(bool(found or exclusions))


def generate(parsed: argparse.Namespace) -> None:
    """Generate the images of the methods of a config."""
    from .generate import read_config, run

    limits = parsed.references, parsed.groups, parsed.split
    for name, done in run(read_config(parsed.config), parsed.methods, *limits).items():
        _print(f"{name}: {done.new} images generated, {done.existing} existed already")
        _print(describe(done.exclusions))


def score(parsed: argparse.Namespace) -> None:
    """Score every image under a folder, and summarise the scores."""
    from .group_scores import load_extractors
    from .processes import this_process
    from .score import score as score_images

    process = this_process()
    names = {name: getattr(parsed, name) for name in ("clip", "dino", "classifier", "subject", "offline")}
    outcome = score_images(
        parsed.manifest,
        parsed.out,
        parsed.results,
        extractors=load_extractors(read_manifest(parsed.manifest), process.device, **names),
        batch=parsed.batch,
        process=process,
    )
    if outcome:
        old = len(outcome.rows) - outcome.scored
        _print(f"{outcome.scored} images scored, {old} were scored before, into {parsed.results}")
        _print(describe(outcome.exclusions))
        _warn(outcome.rows)


def report(parsed: argparse.Namespace) -> None:
    """Write a Markdown report and plots of the scores."""
    from .report import write_report
    from .rows import read_rows

    _print(f"Wrote {write_report(parsed.results, parsed.first, parsed.methods)}")
    _warn(read_rows(parsed.results))


def _warn(items: Iterable[HasTopic]) -> None:
    """Warn about splits with few topics."""
    from .summary import few_topics

    for warning in few_topics(items).values():
        _print(f"mrbench: {warning}", sys.stderr)


def _counts(manifest: Manifest) -> str:
    splits = [group.split for group in manifest.groups]
    each = ", ".join(f"{splits.count(split)} {split}" for split in sorted(set(splits)))
    return f"{len(splits)} groups ({each})"


def _parser() -> argparse.ArgumentParser:
    from .extractors import CLIP, DINO, NONE, TINY_CLASSIFIER
    from .score import BATCH

    parser = argparse.ArgumentParser(prog="python -m easyref_core.mrbench", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(run: Callable[[argparse.Namespace], int | None]) -> Callable[..., argparse.Action]:
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(build)
    option("folder", type=Path, help="one subfolder of images per topic; captions in x.txt or metadata.jsonl")
    option("--manifest", type=Path, help="file to write (default: manifest.json in the folder)")
    option("--name", help="name of the benchmark (default: the folder's)")
    option("--seed", type=int, default=0)
    option("--held-out", type=float, default=0.5, help="fraction of the topics (default 0.5)")
    metavar = ("LEAST", "MOST")
    option("--references", type=int, nargs=2, default=(2, 6), metavar=metavar, help="references of a group")
    option("--category", default=NO_CATEGORY, help="category of images whose metadata have none")
    option(
        "--drop-duplicates", action="store_true", help="drop the later image of a pair instead of an error"
    )
    option("--single", action="store_true", help="every image is a group, its own reference and target")
    option = add(check)
    option("manifest", type=Path)
    option("--identical-only", action="store_true", help="ignore near-duplicates (for procedural images)")
    option = add(generate)
    option("config", type=Path, help="YAML, see easyref_core/mrbench/configs")
    option("--methods", nargs="+", default=(), help="only these methods of the config")
    option("--references", type=int, help="use only the first so many references of each group")
    option("--groups", type=int, help="use only the first so many groups of each split")
    option("--split", choices=SPLITS, help="use only the groups of this split")
    option = add(score)
    option("manifest", type=Path)
    option("out", type=Path, help="folder with <method>/<group id>/<seed>.png")
    option("results", type=Path, help="folder for the CSVs")
    option("--clip", default=CLIP, help=f"name, name@revision, folder or {NONE} (default {CLIP})")
    option("--dino", default=DINO, help=f"name, name@revision, folder or {NONE} (default {DINO})")
    default = f"default: {TINY_CLASSIFIER} if the manifest has attributes"
    option("--classifier", help=f"module:function or {NONE} ({default})")
    option("--subject", default=NONE, help="module:function of a model of the subject's identity")
    option("--offline", action="store_true", help="download nothing")
    option("--batch", type=int, default=BATCH, help=f"images at a time (default {BATCH})")
    option = add(report)
    option("results", type=Path, help="the folder that score wrote")
    option("--first", help='method whose win rates are reported (default "easyref" if it has scores)')
    option("--methods", nargs="+", default=(), help="only these methods, in this order")
    return parser


def _print(text: str, stream: TextIO | None = None) -> None:
    if text:
        print(text, file=stream or sys.stdout)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
