"""Scores pictures, whoever painted them: <out>/<method>/<group id>/<seed>.png -> one row of scores a picture.

Every process takes its share of the groups. A picture already scored, told by its file's content, the extractors and
the group's own files, is not scored again. What cannot be read is named and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..files.atomic_write import atomic_write_text
from .group_scores import Extractors, Picture, Work, bundles, score_bundle
from .images import Exclusion
from .manifest import Group, Manifest, read_manifest, usable
from .processes import Process
from .rows import EXCLUDED, Part, Row, read_rows, remove_parts, take_parts, write_csv, write_rows
from .summary import write_summary

RESULTS, METHOD = "results.json", "method.json"
BATCH = 32  # pictures at a time


class Outcome(NamedTuple):
    """What a run came to."""

    rows: list[Row]
    exclusions: list[Exclusion]
    scored: int  # the rest was already there


def score(
    manifest_file: Path,
    out: Path,
    results: Path,
    extractors: Extractors,
    batch: int = BATCH,
    process: Process | None = None,
) -> Outcome | None:
    """Score every picture under `out` into the folder `results`; None in all processes but the main one."""
    process = process or Process()
    manifest = read_manifest(manifest_file)
    if not out.is_dir():
        raise FileNotFoundError(
            f"There is no folder of pictures at {out}; wanted <method>/<group id>/<seed>.png in it."
        )
    if process.is_main:  # what an earlier run left, finished or killed
        rows, _ = take_parts(results)
        write_rows(results, {row.place: row for row in (*read_rows(results), *rows)}.values())
        remove_parts(results)
    process.wait()
    known = {row.place: row for row in read_rows(results)}
    process.wait()  # nobody writes while another reads
    part = Part(results, process.rank)
    try:
        score_share(
            replace(manifest, groups=process.share(manifest.groups)), out, extractors, batch, known, part
        )
    finally:
        part.close()
    process.wait()
    outcome = _gather(manifest, manifest_file, out, results, extractors, known) if process.is_main else None
    process.wait()
    return outcome


def score_share(
    manifest: Manifest, out: Path, extractors: Extractors, batch: int, known: Mapping[tuple, Row], part: Part
) -> None:
    """Score the pictures of some groups; what is known is taken over."""
    manifest, exclusions = usable(manifest)
    part.write(*exclusions)
    methods = methods_under(out)
    works = []
    for group in manifest.groups:
        scorer = scorer_of(group, extractors.identities)
        pictures, missing = find_pictures(group, methods)
        part.write(*missing)
        done = {p: known[place] for p in pictures if (place := (p.method, group.id, p.seed)) in known}
        done = {p: row for p, row in done.items() if (row.picture, row.scorer) == (p.content, scorer)}
        # how many references were shown is no part of the picture: it may have been set right since
        done = {p: replace(row, references=p.references) for p, row in done.items()}
        part.write(*done.values())
        if left := tuple(picture for picture in pictures if picture not in done):
            works.append(Work(group, scorer, left))
    for bundle in bundles(works, batch):
        part.write(*score_bundle(bundle, extractors, batch))


def methods_under(out: Path) -> list[Path]:
    """The methods' folders."""
    return sorted(path for path in out.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


def find_pictures(group: Group, methods: Iterable[Path]) -> tuple[list[Picture], list[Exclusion]]:
    """The group's pictures of every method, and the methods that have none."""
    pictures, missing = [], []
    for method in methods:
        files = sorted(path for path in (method / group.id).glob("*.png") if path.stem.isdecimal())
        seen = min(len(group.references), references_shown(method) or len(group.references))
        pictures += [
            Picture(method.name, int(file.stem), file, sha256(file.read_bytes()).hexdigest(), seen)
            for file in files
        ]
        if not files:
            missing.append(
                Exclusion("group", f"{method.name}/{group.id}", "this method has no picture of it")
            )
    return pictures, missing


def references_shown(method: Path) -> int | None:
    """How many of a group's references the method was limited to, by its method.json; None where it saw all."""
    file = method / METHOD
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return facts.get("references")


def scorer_of(group: Group, identities: Mapping[str, str | None]) -> str:
    """Hash of everything but the picture that its scores depend on."""
    files = [sha256(file.read_bytes()).hexdigest() for file in (*group.references, group.target)]
    expected = group.attributes and [
        sorted(group.attributes.shared.items()),
        sorted(group.attributes.named.items()),
    ]
    facts = [dict(identities), group.prompt, group.category, group.split, expected, files]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _gather(
    manifest: Manifest,
    manifest_file: Path,
    out: Path,
    results: Path,
    extractors: Extractors,
    known: Mapping[tuple, Row],
) -> Outcome:
    rows, exclusions = take_parts(results)
    exclusions += _strangers(manifest, out)
    write_rows(results, rows)
    write_csv(results / EXCLUDED, ("what", "name", "reason"), map(asdict, exclusions))
    write_summary(results, rows)
    facts = {
        "benchmark": manifest.name,
        "seed": manifest.seed,
        "manifest": sha256(manifest_file.read_bytes()).hexdigest(),
        "extractors": extractors.identities,
        "groups": len(manifest.groups),
        "pictures": len(rows),
        "excluded": len(exclusions),
    }
    atomic_write_text(results / RESULTS, json.dumps(facts, indent=1) + "\n")
    remove_parts(results)
    old = {(*row.place, row.picture, row.scorer) for row in known.values()}
    return Outcome(rows, exclusions, sum((*row.place, row.picture, row.scorer) not in old for row in rows))


def _strangers(manifest: Manifest, out: Path) -> list[Exclusion]:
    """Pictures of groups that the manifest does not have."""
    ids = {group.id for group in manifest.groups}
    folders = [path for method in methods_under(out) for path in sorted(method.iterdir()) if path.is_dir()]
    return [
        Exclusion("group", f"{path.parent.name}/{path.name}", "the manifest has no such group")
        for path in folders
        if path.name not in ids and any(file.stem.isdecimal() for file in path.glob("*.png"))
    ]
