"""Builds a benchmark from a folder of captioned images, or from procedural groups.

The images of a topic are shuffled and cut into groups. No image is in two groups; one image of each group is
its target and the rest are its references. All groups of a topic are in one split. Duplicate images are an
error, or are dropped on request. A method may be trained on the held-in topics: on their images, the
benchmark's references among them, but never on its targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..inspect.duplicates import Fingerprint, find_duplicates, fingerprint, first_of_each
from .captions import NO_CATEGORY, CaptionedImage, read_folder
from .images import BrokenImage, Exclusion, describe, load_image, save_image
from .leaks import leaks
from .manifest import Attributes, Group, Manifest, write_manifest
from .training_rows import TrainingRows, training_rows

MANIFEST = "manifest.json"
MAX_LISTED = 20  # pairs in an error


class ProceduralGroup(Protocol):
    """A group made by code, such as easyref_core.tiny.evaluate.Group; it may also have `captions`."""

    references: Sequence[Image.Image]
    target: Image.Image
    prompt: str
    shared: Mapping[str, str]
    named: Mapping[str, str]


class Build(NamedTuple):
    """A benchmark, what was left out of it, and rows to train on."""

    manifest: Manifest
    exclusions: tuple[Exclusion, ...]
    training: TrainingRows


def from_folder(
    folder: Path | str,
    seed: int = 0,
    held_out: float = 0.5,
    references: tuple[int, int] = (2, 6),
    drop_duplicates: bool = False,
    category: str = NO_CATEGORY,
    name: str | None = None,
    single: bool = False,
) -> Build:
    """Build a benchmark from the captioned images under `folder` (for its layout see captions.py).

    The training rows are of the held-in topics' images without the benchmark's targets.

    Args:
        held_out: fraction of the topics in the held-out split.
        references: minimum and maximum number of references of a group.
        drop_duplicates: drop the later image of each duplicate pair; otherwise duplicates raise ValueError.
        category: category of the images whose metadata have none.
        name: name of the benchmark; the folder's if None.
        single: make every image a group, its own reference and target, as in the paper's Table 2. Images
        beside the topics are read too. No training rows are left then, because every image is a target.
    """
    folder = Path(folder)
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is {held_out}; wanted a fraction of the topics, 0 to 1.")
    if not 1 <= references[0] <= references[1]:
        raise ValueError(
            f"references is {references}; wanted the minimum and the maximum of a group, 1 <= minimum <= "
            "maximum."
        )
    images, exclusions = read_folder(folder, category, flat=single)
    prints, broken = _fingerprints(images)
    exclusions += broken
    images = [image for image in images if image.file in prints]
    splits = split_topics(list(dict.fromkeys(image.topic for image in images)), held_out, seed)
    if drop_duplicates:
        dropped = first_of_each(prints)
        exclusions += [Exclusion("picture", str(a), f"it repeats {b}") for a, b in dropped.items()]
        images = [image for image in images if image.file not in dropped]
    else:
        _refuse_duplicates(images, prints, splits)
    if single:
        groups, leftovers = tuple(_group(i, [image, image], splits) for i, image in enumerate(images)), []
    else:
        groups, leftovers = _cut(images, splits, references, seed)
    if not groups:
        wanted = (
            "one image"
            if single
            else f"{references[0] + 1} images, one target and {references[0]} references"
        )
        raise ValueError(
            f"No topic under {folder} has enough usable images; wanted {wanted}, each with a caption.\n"
            + describe(exclusions[:MAX_LISTED])
        )
    targets = {group.target for group in groups}
    held_in = [i for i in images if splits[i.topic] == "held-in" and i.file not in targets]
    training = training_rows(folder, held_in, references[1] + 1)
    return Build(Manifest(name or folder.resolve().name, seed, groups), (*exclusions, *leftovers), training)


def from_groups(
    folder: Path | str,
    groups: Iterable[tuple[str, str, ProceduralGroup]],
    name: str = "procedural",
    seed: int = 0,
) -> Manifest:
    """Write a benchmark of procedural groups: PNGs and, last, manifest.json under `folder`.

    groups: (split, category, group). Only identical images are an error, because procedural images resemble
    each other by design.
    """
    folder = Path(folder)
    written = tuple(
        _write_group(folder / f"{split}-{i:04d}", split, category, group)
        for i, (split, category, group) in enumerate(groups)
    )
    manifest = Manifest(name, seed, written)
    if pairs := leaks(manifest, near=False):
        raise ValueError(f"The procedural groups leak. {_list_pairs(pairs)}\nDraw them with other seeds.")
    write_manifest(manifest, folder / MANIFEST)
    return manifest


def split_topics(topics: Sequence[str], held_out: float, seed: int) -> dict[str, str]:
    """Draw the split of each topic. With two topics or more and 0 < held_out < 1, no split is empty."""
    count = round(held_out * len(topics))
    if len(topics) > 1 and 0 < held_out < 1:
        count = min(max(count, 1), len(topics) - 1)
    order = np.random.default_rng(seed).permutation(len(topics))
    drawn = {topics[i] for i in order[:count]}
    return {topic: "held-out" if topic in drawn else "held-in" for topic in topics}


def _fingerprints(images: Iterable[CaptionedImage]) -> tuple[dict[Path, Fingerprint], list[Exclusion]]:
    prints, broken = {}, []
    for image in images:
        try:
            prints[image.file] = fingerprint(load_image(image.file))
        except BrokenImage as error:
            broken.append(Exclusion("picture", str(image.file), str(error)))
    return prints, broken


def _refuse_duplicates(
    images: Iterable[CaptionedImage], prints: Mapping[Path, Fingerprint], splits: Mapping[str, str]
) -> None:
    topics = {image.file: image.topic for image in images}

    def describe(first: str, second: str) -> str:
        if first == second:
            return f"inside topic {first}, where a target could be its own reference"
        if splits[first] == splits[second]:
            return f"in topics {first} and {second}"
        return f"held-in and held-out, topics {first} and {second}"

    lines = [f"{describe(topics[a.first], topics[a.second])}: {a}" for a in find_duplicates(prints)]
    if lines:
        raise ValueError(
            f"The folder has duplicate images. {_list_pairs(lines)}\nRemove one of each pair, or drop the "
            "later one with --drop-duplicates (drop_duplicates=True)."
        )


def _cut(
    images: Iterable[CaptionedImage], splits: Mapping[str, str], references: tuple[int, int], seed: int
) -> tuple[tuple[Group, ...], list[Exclusion]]:
    """Cut every topic's images into groups; leftovers that are too few for a group are excluded."""
    topics: dict[str, list[CaptionedImage]] = {}
    for image in images:
        topics.setdefault(image.topic, []).append(image)
    groups, leftovers = [], []
    for number, (topic, members) in enumerate(topics.items()):
        order = np.random.default_rng([seed, number]).permutation(len(members))
        shuffled = [members[i] for i in order]
        for start in range(0, len(shuffled), references[1] + 1):
            chunk = shuffled[start : start + references[1] + 1]
            if len(chunk) > references[0]:
                groups.append(_group(len(groups), chunk, splits))
            else:
                reason = f"{len(chunk)} images left over; a group takes at least {references[0] + 1}"
                leftovers.append(Exclusion("topic", topic, reason))
    return tuple(groups), leftovers


def _group(number: int, chunk: Sequence[CaptionedImage], splits: Mapping[str, str]) -> Group:
    target, *references = chunk
    split = splits[target.topic]
    return Group(
        id=f"{split}-{number:04d}",
        references=tuple(image.file for image in references),
        target=target.file,
        prompt=target.text,
        category=target.category,
        split=split,
        captions=tuple(image.text for image in references),
        topic=target.topic,
    )


def _write_group(folder: Path, split: str, category: str, group: ProceduralGroup) -> Group:
    references = tuple(folder / f"reference_{i}.png" for i in range(len(group.references)))
    files = (*references, folder / "target.png")
    for image, file in zip((*group.references, group.target), files, strict=True):
        save_image(image, file)
    return Group(
        id=folder.name,
        references=references,
        target=files[-1],
        prompt=group.prompt,
        category=category,
        split=split,
        captions=tuple(getattr(group, "captions", ())),
        attributes=Attributes(dict(group.shared), dict(group.named)),
    )


def _list_pairs(lines: Sequence[Any]) -> str:
    more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([f"{len(lines)} pairs:", *map(str, lines[:MAX_LISTED]), *more])
