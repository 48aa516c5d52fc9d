"""Makes a benchmark: from a folder of captioned images, or from pictures made by code.

A topic's images are shuffled and cut into groups; no image is in two of them, and one image of each is its target, the
rest are its references. Whole topics go to one split. Pictures that repeat another are refused, or dropped on request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..files.atomic_write import atomic_write
from ..inspect.duplicates import Fingerprint, find_duplicates, fingerprint, first_of_each
from .captions import NO_CATEGORY, CaptionedImage, read_folder
from .images import BrokenPicture, Exclusion, open_picture
from .leaks import leaks
from .manifest import Attributes, Group, Manifest, write_manifest

if TYPE_CHECKING:
    from PIL import Image

    Chunk = tuple[str, Sequence[CaptionedImage]]

MANIFEST = "manifest.json"
LISTED = 20  # pairs an error names


class MadeGroup(Protocol):
    """A group made by code, as easyref_core.tiny.groups makes them."""

    references: Sequence[Image.Image]
    target: Image.Image
    prompt: str
    shared: Mapping[str, str]
    named: Mapping[str, str]


class Build(NamedTuple):
    """A benchmark, and what had to be left out of it."""

    manifest: Manifest
    exclusions: tuple[Exclusion, ...]


def from_folder(
    folder: Path | str,
    seed: int = 0,
    held_out: float = 0.5,
    references: tuple[int, int] = (2, 6),
    drop_duplicates: bool = False,
    category: str = NO_CATEGORY,
    name: str | None = None,
) -> Build:
    """A benchmark of the captioned images under `folder` (captions.py says how they lie there).

    held_out: part of the topics; references: least and most in one group. Raises ValueError naming the pairs where
    pictures repeat each other; with `drop_duplicates` the later one of a pair is left out instead.
    """
    folder = Path(folder)
    _check_numbers(held_out, references)
    images, exclusions = read_folder(folder, category)
    prints, broken = _fingerprints(images)
    exclusions += broken
    images = [image for image in images if image.file in prints]
    topics = list(dict.fromkeys(image.topic for image in images))
    splits = split_topics(topics, held_out, seed)
    if drop_duplicates:
        dropped = first_of_each(prints)
        exclusions += [Exclusion("picture", str(a), f"it repeats {b}") for a, b in dropped.items()]
        images = [image for image in images if image.file not in dropped]
    else:
        _refuse_duplicates(images, prints, splits)
    groups, small = _cut(images, splits, references, seed)
    if not groups:
        raise ValueError(
            f"No topic under {folder} has {references[0] + 1} usable images, one target and {references[0]} references."
        )
    return Build(Manifest(name or folder.resolve().name, seed, groups), (*exclusions, *small))


def from_groups(
    folder: Path | str, groups: Iterable[tuple[str, str, MadeGroup]], name: str = "procedural", seed: int = 0
) -> Manifest:
    """Write a benchmark of made groups, each with its split and category: PNGs and manifest.json under `folder`.

    Such pictures resemble each other by design, so only identical ones are refused; the manifest is written last.
    """
    folder = Path(folder)
    made = tuple(
        _write_group(folder, f"{split}-{i:04d}", split, category, group)
        for i, (split, category, group) in enumerate(groups)
    )
    manifest = Manifest(name, seed, made)
    if found := leaks(manifest, near=False):
        raise ValueError(f"The made groups leak. {_listed(found)}\nDraw them with other seeds.")
    write_manifest(manifest, folder / MANIFEST)
    return manifest


def split_topics(topics: Sequence[str], held_out: float, seed: int) -> dict[str, str]:
    """The split of each topic, drawn by the seed; both splits get a topic where there are two and a part is asked of each."""
    count = round(held_out * len(topics))
    if len(topics) > 1 and 0 < held_out < 1:
        count = min(max(count, 1), len(topics) - 1)
    order = np.random.default_rng(seed).permutation(len(topics))
    away = {topics[i] for i in order[:count]}
    return {topic: "held-out" if topic in away else "held-in" for topic in topics}


def _fingerprints(images: Iterable[CaptionedImage]) -> tuple[dict[Path, Fingerprint], list[Exclusion]]:
    prints, broken = {}, []
    for image in images:
        try:
            prints[image.file] = fingerprint(open_picture(image.file))
        except BrokenPicture as error:
            broken.append(Exclusion("picture", str(image.file), str(error)))
    return prints, broken


def _refuse_duplicates(
    images: Iterable[CaptionedImage], prints: Mapping[Path, Fingerprint], splits: Mapping[str, str]
) -> None:
    topics = {image.file: image.topic for image in images}

    def where(first: str, second: str) -> str:
        if first == second:
            return f"inside topic {first}, where a target could be its own reference"
        if splits[first] == splits[second]:
            return f"in topics {first} and {second}"
        return f"held-in and held-out, topics {first} and {second}"

    pairs = find_duplicates(prints)
    if pairs:
        lines = [f"{where(topics[pair.first], topics[pair.second])}: {pair}" for pair in pairs]
        raise ValueError(
            f"Pictures repeat each other. {_listed(lines)}\n"
            "Remove one of each pair, or let the later one be left out (--drop-duplicates, drop_duplicates=True)."
        )


def _cut(
    images: Iterable[CaptionedImage], splits: Mapping[str, str], references: tuple[int, int], seed: int
) -> tuple[tuple[Group, ...], list[Exclusion]]:
    """Every topic's images as groups, and what was too little for one."""
    topics: dict[str, list[CaptionedImage]] = {}
    for image in images:
        topics.setdefault(image.topic, []).append(image)
    groups, small = [], []
    for number, (topic, members) in enumerate(topics.items()):
        order = np.random.default_rng([seed, number]).permutation(len(members))
        shuffled = [members[i] for i in order]
        for start in range(0, len(shuffled), references[1] + 1):
            chunk = shuffled[start : start + references[1] + 1]
            if len(chunk) > references[0]:
                groups.append(_group(len(groups), chunk, splits[topic]))
            else:
                why = f"{len(chunk)} images left over; a group takes at least {references[0] + 1}"
                small.append(Exclusion("topic", topic, why))
    return tuple(groups), small


def _group(number: int, chunk: Sequence[CaptionedImage], split: str) -> Group:
    target, *references = chunk
    files = tuple(image.file for image in references)
    captions = tuple(image.text for image in references)
    return Group(f"{split}-{number:04d}", files, target.file, target.text, target.category, split, captions)


def _write_group(folder: Path, group_id: str, split: str, category: str, group: MadeGroup) -> Group:
    place = folder / group_id
    place.mkdir(parents=True, exist_ok=True)
    references = tuple(place / f"reference_{i}.png" for i in range(len(group.references)))
    for picture, file in zip(
        (*group.references, group.target), (*references, place / "target.png"), strict=True
    ):
        with atomic_write(file) as partial:
            picture.save(partial, format="PNG")
    captions = tuple(getattr(group, "captions", ()))  # not every maker of groups describes its references
    attributes = Attributes(dict(group.shared), dict(group.named))
    return Group(
        group_id, references, place / "target.png", group.prompt, category, split, captions, attributes
    )


def _listed(lines: Sequence[Any]) -> str:
    more = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n  ".join([f"{len(lines)} pairs:", *map(str, lines[:LISTED]), *more])


def _check_numbers(held_out: float, references: tuple[int, int]) -> None:
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is {held_out}; wanted a part of the topics, 0 to 1.")
    if not 1 <= references[0] <= references[1]:
        raise ValueError(
            f"references is {references}; wanted least and most in a group, the least at least 1."
        )
