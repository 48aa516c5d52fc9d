"""Scores the images in <out>/<method>/<group id>/<seed>.png, one row each.

Every process scores a share of the groups. An image is scored again only if its file, an extractor or a file
of its group has changed. Images that cannot be loaded are listed and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from ..files.atomic_write import atomic_write_text
from .group_scores import Extractors, GroupJob, bundles, score_bundle
from .images import Exclusion
from .latency import collect, write_latencies
from .manifest import Group, Manifest, read_manifest, usable
from .processes import Process
from .record import read_record
from .rows import EXCLUDED, Key, Row, read_parts, read_rows, remove_parts, write_csv, write_part, write_rows
from .summary import write_summary

RESULTS = "results.json"
BATCH = 32  # images


@dataclass(frozen=True)
class Outcome:
    """Results of a run."""

    rows: list[Row]
    exclusions: list[Exclusion]
    scored: int  # rows that are new


def score(
    manifest_file: Path,
    out: Path,
    results: Path,
    extractors: Extractors,
    batch: int = BATCH,
    process: Process | None = None,
) -> Outcome | None:
    """Score every image under `out` and write the CSVs into the folder `results`.

    Returns the outcome in the main process and None in the others.
    """
    process = process or Process()
    manifest = read_manifest(manifest_file)
    if not out.is_dir():
        raise FileNotFoundError(
            f"There is no folder of images at {out}; wanted <method>/<group id>/<seed>.png in it."
        )
    if process.is_main:  # collect the parts of an earlier run, finished or killed
        rows, _ = read_parts(results)
        write_rows(results, {row.key: row for row in (*read_rows(results), *rows)}.values())
        remove_parts(results)
    process.wait()
    known = {row.key: row for row in read_rows(results)}
    process.wait()  # no process writes while another reads
    share = replace(manifest, groups=process.share(manifest.groups))
    write_part(results, process.rank, score_share(share, out, known, extractors, batch))
    process.wait()
    outcome = None
    if process.is_main:
        outcome = _gather(results, known, _unknown_groups(manifest, out))
        facts = {
            "benchmark": manifest.name,
            "seed": manifest.seed,
            "manifest": sha256(manifest_file.read_bytes()).hexdigest(),
            "extractors": extractors.identities,
            "groups": len(manifest.groups),
            "pictures": len(outcome.rows),
            "excluded": len(outcome.exclusions),
        }
        atomic_write_text(results / RESULTS, json.dumps(facts, indent=1) + "\n")
        write_latencies(results, collect(methods_under(out)))
        remove_parts(results)
    process.wait()
    return outcome


def score_share(
    manifest: Manifest, out: Path, known: Mapping[Key, Row], extractors: Extractors, batch: int
) -> Iterator[Row | Exclusion]:
    """Rows and exclusions of some groups; rows in `known` are reused while their version is the same."""
    manifest, exclusions = usable(manifest)
    yield from exclusions
    methods = methods_under(out)
    jobs = []
    for group in manifest.groups:
        images, missing = find_images(group, methods, scorer_hash(group, extractors.identities))
        yield from missing
        todo = {}
        for file, image in images.items():
            row = known.get(image.key)
            if row and row.version == image.version:
                # The version does not cover these, because method.json and topics may be corrected.
                yield replace(row, references=image.references, topic=image.topic)
            else:
                todo[file] = image
        if todo:
            jobs.append(GroupJob(group, todo))
    for bundle in bundles(jobs, batch):
        yield from score_bundle(bundle, extractors, batch)


def methods_under(out: Path) -> list[Path]:
    """Folders of the methods."""
    return sorted(path for path in out.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


def find_images(
    group: Group, methods: Iterable[Path], scorer: str
) -> tuple[dict[Path, Row], list[Exclusion]]:
    """Rows without scores of the group's images, by file, and exclusions of the methods that have none."""
    images, missing = {}, []
    for method in methods:
        files = sorted(path for path in (method / group.id).glob("*.png") if path.stem.isdecimal())
        count = len(group.references)
        for file in files:
            images[file] = Row(
                method=method.name,
                group=group.id,
                topic=group.topic,
                category=group.category,
                split=group.split,
                seed=int(file.stem),
                references=min(count, (read_record(method) or {}).get("references") or count),
                picture=sha256(file.read_bytes()).hexdigest(),
                scorer=scorer,
            )
        if not files:
            missing.append(Exclusion("group", f"{method.name}/{group.id}", "this method has no image of it"))
    return images, missing


def scorer_hash(group: Group, identities: Mapping[str, str | None]) -> str:
    """Hash of everything but the image that its scores depend on."""
    files = [sha256(file.read_bytes()).hexdigest() for file in (*group.references, group.target)]
    attributes = group.attributes
    expected = attributes and [sorted(attributes.shared.items()), sorted(attributes.named.items())]
    facts = [dict(identities), group.prompt, group.category, group.split, expected, files]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _gather(results: Path, known: Mapping[Key, Row], unknown: Iterable[Exclusion]) -> Outcome:
    """Write the CSVs from the parts of all processes."""
    rows, exclusions = read_parts(results)
    exclusions += unknown
    write_rows(results, rows)
    write_csv(results / EXCLUDED, ("what", "name", "reason"), map(asdict, exclusions))
    write_summary(results, rows)
    old = {(row.key, row.version) for row in known.values()}
    return Outcome(rows, exclusions, sum((row.key, row.version) not in old for row in rows))


def _unknown_groups(manifest: Manifest, out: Path) -> list[Exclusion]:
    ids = {group.id for group in manifest.groups}
    folders = [path for method in methods_under(out) for path in sorted(method.iterdir()) if path.is_dir()]
    return [
        Exclusion("group", f"{path.parent.name}/{path.name}", "the manifest has no such group")
        for path in folders
        if path.name not in ids and any(file.stem.isdecimal() for file in path.glob("*.png"))
    ]
