"""The benchmark's command line: build, check, generate, score, report. `--help` of each says the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .captions import NO_CATEGORY
from .images import describe
from .manifest import read_manifest, usable, write_manifest

if TYPE_CHECKING:
    from .group_scores import Extractors
    from .manifest import Manifest

NONE = "none"  # leaves an extractor out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what is wrong with the input is told in one line, without a traceback."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed) or 0
    except (ValueError, FileNotFoundError) as error:
        _say(f"mrbench: {error}", sys.stderr)
        return 1


def build(parsed: argparse.Namespace) -> int:
    """A manifest from a folder of captioned images."""
    from .builder import MANIFEST, from_folder

    made = from_folder(
        parsed.folder,
        parsed.seed,
        parsed.held_out,
        tuple(parsed.references),
        parsed.drop_duplicates,
        parsed.category,
        parsed.name,
    )
    file = parsed.manifest or parsed.folder / MANIFEST
    write_manifest(made.manifest, file)
    _say(f"Wrote {file}: {_counts(made.manifest)}")
    _say(describe(made.exclusions))
    return 0


def check(parsed: argparse.Namespace) -> int:
    """What a manifest's pictures are worth: broken ones, and pictures that give an answer away."""
    from .leaks import leaks

    manifest, exclusions = usable(read_manifest(parsed.manifest))
    found = leaks(manifest, near=not parsed.identical_only)
    _say(f"{parsed.manifest}: {_counts(manifest)}")
    _say(describe(exclusions))
    _say("\n".join([f"{len(found)} leaks:", *(f"  {leak}" for leak in found)]) if found else "No leak.")
    return int(bool(found or exclusions))


def generate(parsed: argparse.Namespace) -> int:
    """Pictures of the methods of a config."""
    from .generate import read_config, run

    for name, done in run(read_config(parsed.config), parsed.methods, parsed.references).items():
        _say(f"{name}: {done.painted} pictures painted, {done.kept} were there")
        _say(describe(done.exclusions))
    return 0


def score(parsed: argparse.Namespace) -> int:
    """Scores of every picture under a folder, and their summary."""
    from .processes import this_process
    from .score import score as score_pictures

    process = this_process()
    extractors = _extractors(parsed, process.device, read_manifest(parsed.manifest))
    outcome = score_pictures(parsed.manifest, parsed.out, parsed.results, extractors, parsed.batch, process)
    if outcome:
        old = len(outcome.rows) - outcome.scored
        _say(f"{outcome.scored} pictures scored, {old} were scored before, into {parsed.results}")
        _say(describe(outcome.exclusions))
    return 0


def report(parsed: argparse.Namespace) -> int:
    """Markdown table and plots of scores."""
    from .report import write_report

    _say(f"Wrote {write_report(parsed.results, parsed.first, parsed.methods)}")
    return 0


def _extractors(parsed: argparse.Namespace, device: str, manifest: Manifest) -> Extractors:
    """The models that the options name, loaded. The classifier is only there for groups with attributes."""
    from .extractors import TINY_CLASSIFIER, Clip, Dino, load_attribute_reader
    from .group_scores import Extractors

    def model(kind: type, name: str) -> Clip | Dino | None:
        if name == NONE:
            return None
        name, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
        return kind(name, revision or None, parsed.offline, device)

    wants_attributes = any(group.attributes for group in manifest.groups)
    classifier = parsed.classifier or (TINY_CLASSIFIER if wants_attributes else NONE)
    reader = None if classifier == NONE else load_attribute_reader(classifier)
    return Extractors(model(Clip, parsed.clip), model(Dino, parsed.dino), reader, classifier)


def _counts(manifest: Manifest) -> str:
    splits = [group.split for group in manifest.groups]
    each = ", ".join(f"{splits.count(split)} {split}" for split in sorted(set(splits)))
    return f"{len(splits)} groups ({each})"


def _parser() -> argparse.ArgumentParser:
    from .extractors import CLIP, DINO, TINY_CLASSIFIER
    from .score import BATCH

    parser = argparse.ArgumentParser(prog="python -m easyref_core.mrbench", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("build", help=build.__doc__)
    one.add_argument(
        "folder", type=Path, help="one subfolder of images a topic; captions in x.txt or metadata.jsonl"
    )
    one.add_argument(
        "--manifest", type=Path, help="the file to write; manifest.json in the folder if not given"
    )
    one.add_argument("--name", help="of the benchmark; the folder's if not given")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--held-out", type=float, default=0.5, help="part of the topics (default 0.5)")
    one.add_argument(
        "--references", type=int, nargs=2, default=(2, 6), metavar=("LEAST", "MOST"), help="of a group"
    )
    one.add_argument("--category", default=NO_CATEGORY, help="of images whose metadata name none")
    one.add_argument(
        "--drop-duplicates", action="store_true", help="leave the later one of a pair out, not refuse"
    )
    one.set_defaults(run=build)

    one = commands.add_parser("check", help=check.__doc__)
    one.add_argument("manifest", type=Path)
    one.add_argument(
        "--identical-only", action="store_true", help="near-duplicates are meant (pictures made by code)"
    )
    one.set_defaults(run=check)

    one = commands.add_parser("generate", help=generate.__doc__)
    one.add_argument("config", type=Path, help="YAML, see easyref_core/mrbench/configs")
    one.add_argument("--methods", nargs="+", default=(), help="only these of the config")
    one.add_argument(
        "--references", type=int, help="show every method only so many of each group's references"
    )
    one.set_defaults(run=generate)

    one = commands.add_parser("score", help=score.__doc__)
    one.add_argument("manifest", type=Path)
    one.add_argument("out", type=Path, help="<method>/<group id>/<seed>.png lie in it")
    one.add_argument("results", type=Path, help="folder for the CSVs")
    one.add_argument("--clip", default=CLIP, help=f"name, name@revision, folder or {NONE} (default {CLIP})")
    one.add_argument("--dino", default=DINO, help=f"name, name@revision, folder or {NONE} (default {DINO})")
    one.add_argument(
        "--classifier",
        help=f"module:function or {NONE}; where the manifest has attributes {TINY_CLASSIFIER} if not given",
    )
    one.add_argument("--offline", action="store_true", help="download nothing")
    one.add_argument("--batch", type=int, default=BATCH, help=f"pictures at a time (default {BATCH})")
    one.set_defaults(run=score)

    one = commands.add_parser("report", help=report.__doc__)
    one.add_argument("results", type=Path, help="the folder that score wrote")
    one.add_argument("--first", help='the method whose win rates are shown ("easyref" where there is one)')
    one.add_argument("--methods", nargs="+", default=(), help="only these, in this order")
    one.set_defaults(run=report)
    return parser


def _say(text: str, stream=None) -> None:
    if text:
        print(text, file=stream or sys.stdout)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
