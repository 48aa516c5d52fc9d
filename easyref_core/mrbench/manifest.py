"""Manifest of a benchmark: a JSON file with the references, prompt and target of each group.

    {"name": "my benchmark", "seed": 0, "groups": [
        {"id": "cat-0", "references": ["cat/1.jpg", "cat/2.jpg"], "target": "cat/3.jpg",
         "prompt": "a cat in a box", "category": "subject", "split": "held-out", "topic": "cat",
         "captions": ["a cat on a sofa", "a cat outdoors"],
         "attributes": {"shared": {"colour": "red"}, "named": {"background": "sand"}}}]}

Paths are relative to the manifest's folder. Three keys are optional, all others required. `topic`: groups of
one topic resemble each other, so intervals resample topics; a group without it is a topic of its own.
`captions`: one for each reference, in their order (used to train a LoRA). `attributes`: for procedural
images, those that the references share and those that the prompt names; a generated image should show both.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..files.atomic_write import atomic_write_text
from .checks import check_fields, check_type
from .images import BrokenImage, Exclusion, load_image

SPLITS = ("held-in", "held-out")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # an id is a folder name of generated images
MANIFEST_FIELDS = {"name": str, "seed": int, "groups": list}
GROUP_FIELDS = {"id": str, "target": str, "prompt": str, "category": str, "split": str, "references": list}
OPTIONAL_GROUP_FIELDS = {"attributes": dict, "captions": list, "topic": str}
ATTRIBUTE_FIELDS = {"shared": dict, "named": dict}


@dataclass(frozen=True)
class Attributes:
    """Attributes that an image of the group should show, each {attribute: value}."""

    shared: Mapping[str, str]  # common to the references
    named: Mapping[str, str]  # named by the prompt


@dataclass(frozen=True)
class Group:
    """References of one topic, a prompt, and the held-out image that the prompt describes."""

    id: str
    references: tuple[Path, ...]  # resolved against the manifest's folder
    target: Path
    prompt: str
    category: str  # style, identity, character, ...: results are reported for each
    split: str  # one of SPLITS
    captions: tuple[str, ...] = ()  # one for each reference, or none
    attributes: Attributes | None = None
    topic: str = ""  # the group's id if empty

    def __post_init__(self) -> None:
        object.__setattr__(self, "topic", self.topic or self.id)

    @property
    def is_single(self) -> bool:
        """True for a single image that is its own reference and target."""
        return self.references == (self.target,)


@dataclass(frozen=True)
class Manifest:
    """A benchmark."""

    name: str
    seed: int  # the seed that the groups were drawn with
    groups: tuple[Group, ...]


def read_manifest(path: Path | str) -> Manifest:
    """Load a manifest.

    Raises FileNotFoundError if there is none, and ValueError for the first thing that is not as documented.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no manifest at {path}. `python -m easyref_core.mrbench build` makes one."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    where = f"Manifest {path.name}"
    check_fields(where, data, MANIFEST_FIELDS)
    groups = tuple(_read_group(i, group, path.parent) for i, group in enumerate(data["groups"]))
    # Two ids that differ in case only would share a folder on some file systems.
    repeated = [name for name, count in Counter(group.id.casefold() for group in groups).items() if count > 1]
    if repeated:
        raise ValueError(f"{where} has more than one group {repeated[0]!r}. Give every group its own id.")
    if not groups:
        raise ValueError(f"{where} has no groups; wanted at least one.")
    splits: dict[str, str] = {}
    for group in groups:
        if splits.setdefault(group.topic, group.split) != group.split:
            raise ValueError(
                f"{where}: topic {group.topic!r} is in both splits; wanted all groups of a topic in one, "
                "because a method may have been trained on the topics of held-in."
            )
    return Manifest(data["name"], data["seed"], groups)


def write_manifest(manifest: Manifest, path: Path | str) -> None:
    """Write the manifest; the paths of its images become relative to it."""
    path = Path(path)
    groups = [_group_to_dict(group, path.parent) for group in manifest.groups]
    data = {"name": manifest.name, "seed": manifest.seed, "groups": groups}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def usable(manifest: Manifest) -> tuple[Manifest, tuple[Exclusion, ...]]:
    """Return the manifest without the images that cannot be loaded, and the exclusions.

    A broken reference is dropped from its group. A group is dropped if its target or all its references are
    broken.
    """
    groups, exclusions = [], []
    for group in manifest.groups:
        roles = {**dict.fromkeys(group.references, "reference"), group.target: "target"}
        broken = {file: reason for file in roles if (reason := _fault(file))}
        exclusions += [Exclusion(roles[f], f"{f} of group {group.id}", why) for f, why in broken.items()]
        intact = [i for i, file in enumerate(group.references) if file not in broken]
        if group.target in broken:
            exclusions.append(Exclusion("group", group.id, "its target is missing or broken"))
        elif not intact:
            exclusions.append(Exclusion("group", group.id, "none of its references can be loaded"))
        else:
            references = tuple(group.references[i] for i in intact)
            captions = tuple(group.captions[i] for i in intact) if group.captions else ()
            groups.append(replace(group, references=references, captions=captions))
    return replace(manifest, groups=tuple(groups)), tuple(exclusions)


def _fault(file: Path) -> str:
    try:
        load_image(file)
    except BrokenImage as error:
        return str(error)
    return ""


def _read_group(position: int, data: Any, folder: Path) -> Group:
    known = data.get("id") if isinstance(data, dict) else None
    where = f"Group {known!r}" if known else f"Group {position} (counted from 0)"
    check_fields(where, data, GROUP_FIELDS, OPTIONAL_GROUP_FIELDS)
    if not ID.fullmatch(data["id"]):
        raise ValueError(
            f"{where}: its id is a folder name; wanted letters, digits, '.', '_' and '-', the first of them "
            "a letter or digit."
        )
    if data["split"] not in SPLITS:
        raise ValueError(f"{where}: split is {data['split']!r}; wanted {' or '.join(map(repr, SPLITS))}.")
    if not data["references"]:
        raise ValueError(f"{where}: references is empty; wanted at least one image.")
    if not data["category"]:
        raise ValueError(f'{where}: category is empty; wanted a word, such as "style" or "identity".')
    references = tuple(_path(where, "references", file, folder) for file in data["references"])
    target = _path(where, "target", data["target"], folder)
    if target in references and len(references) > 1:
        raise ValueError(f"{where}: its target {data['target']} is also one of its references.")
    if len(set(references)) < len(references):
        raise ValueError(f"{where}: it names one reference twice.")
    return Group(
        id=data["id"],
        references=references,
        target=target,
        prompt=data["prompt"],
        category=data["category"],
        split=data["split"],
        captions=_read_captions(where, data["captions"], len(references)) if "captions" in data else (),
        attributes=_read_attributes(where, data["attributes"]) if "attributes" in data else None,
        topic=data.get("topic", ""),
    )


def _read_captions(where: str, data: list, references: int) -> tuple[str, ...]:
    for caption in data:
        check_type(f"{where}, captions", "one of them", caption, str)
    if len(data) != references:
        raise ValueError(
            f"{where} has {len(data)} captions for {references} references; wanted one for each."
        )
    return tuple(data)


def _read_attributes(where: str, data: Any) -> Attributes:
    where = f"{where}, attributes"
    check_fields(where, data, ATTRIBUTE_FIELDS)
    for key, values in data.items():
        for name, value in values.items():
            check_type(f"{where}, {key}", name, value, str)
    return Attributes(**data)


def _path(where: str, key: str, file: Any, folder: Path) -> Path:
    check_type(where, key, file, str)
    if not file or Path(file).is_absolute():
        raise ValueError(f"{where}: {key} has {file!r}; wanted a path relative to the manifest.")
    return folder / file


def _group_to_dict(group: Group, folder: Path) -> dict[str, Any]:
    data = asdict(group)
    data["references"] = [_relative(file, folder) for file in group.references]
    data["target"] = _relative(group.target, folder)
    data["topic"] = "" if group.topic == group.id else group.topic
    return {key: value for key, value in data.items() if value or key not in OPTIONAL_GROUP_FIELDS}


def _relative(file: Path, folder: Path) -> str:
    """The path from the folder, with forward slashes on every system and `..` where it leads outside."""
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
