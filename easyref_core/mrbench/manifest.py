"""The benchmark's manifest: one JSON file that says which references, prompt and target make up each group.

    {"name": "my benchmark", "seed": 0, "groups": [
        {"id": "cat-0", "references": ["cat/1.jpg", "cat/2.jpg"], "target": "cat/3.jpg",
         "prompt": "a cat in a box", "category": "subject", "split": "held-out",
         "captions": ["a cat on a sofa", "a cat outdoors"],
         "attributes": {"shared": {"colour": "red"}, "named": {"background": "sand"}}}]}

Paths are relative to the manifest's folder. Two keys are optional, all others required. `captions`: one of each
reference, in their order (a LoRA trains on them). `attributes`: for pictures made by code, what the references share,
and what the prompt names; both should be seen in the picture.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files.atomic_write import atomic_write_text
from .images import BrokenPicture, Exclusion, open_picture

SPLITS = ("held-in", "held-out")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # an id names a folder of generated pictures
MANIFEST_KEYS = {"name", "seed", "groups"}
GROUP_KEYS = {"id", "references", "target", "prompt", "category", "split"}
OPTIONAL_GROUP_KEYS = {"attributes", "captions"}
ATTRIBUTE_KEYS = {"shared", "named"}


@dataclass(frozen=True)
class Attributes:
    """What a picture of the group should show, by attribute: value."""

    shared: Mapping[str, str]  # what the references have in common
    named: Mapping[str, str]  # what the prompt asks for


@dataclass(frozen=True)
class Group:
    """References of one topic, a prompt, and the held-out picture that the prompt describes."""

    id: str
    references: tuple[Path, ...]  # resolved against the manifest's folder
    target: Path
    prompt: str
    category: str  # style, identity, character, ...: whatever results should be told apart by
    split: str  # one of SPLITS
    captions: tuple[str, ...] = ()  # of the references, or none
    attributes: Attributes | None = None


@dataclass(frozen=True)
class Manifest:
    """One benchmark."""

    name: str
    seed: int  # what the benchmark was drawn with
    groups: tuple[Group, ...]


def read_manifest(path: Path | str) -> Manifest:
    """The manifest in a JSON file. Raises ValueError on the first thing that is not as documented, naming it."""
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
    _check_keys(where, data, MANIFEST_KEYS)
    _check(where, "name", data["name"], str)
    _check(where, "seed", data["seed"], int)
    _check(where, "groups", data["groups"], list)
    groups = tuple(_read_group(i, group, path.parent) for i, group in enumerate(data["groups"]))
    # Two ids that differ in case only would share a folder on some file systems.
    repeated = [name for name, count in Counter(group.id.casefold() for group in groups).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{where} has more than one group {repeated[0]!r}. Give every group an id of its own."
        )
    if not groups:
        raise ValueError(f"{where} holds no group.")
    return Manifest(data["name"], data["seed"], groups)


def write_manifest(manifest: Manifest, path: Path | str) -> None:
    """Write the manifest; its pictures' paths become relative to it."""
    path = Path(path)
    data = {
        "name": manifest.name,
        "seed": manifest.seed,
        "groups": [_group_to_dict(group, path.parent) for group in manifest.groups],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def usable(manifest: Manifest) -> tuple[Manifest, tuple[Exclusion, ...]]:
    """The manifest without what cannot be opened, and what that was.

    A broken reference leaves its group; a group without its target, or without any reference, leaves the benchmark.
    """
    kept, exclusions = [], []
    for group in manifest.groups:
        broken = [(what, file, why) for what, file in _files(group) if (why := _fault(file))]
        exclusions += [Exclusion(what, f"{file} of group {group.id}", why) for what, file, why in broken]
        files = {file for _, file, _ in broken}
        whole = [i for i, file in enumerate(group.references) if file not in files]
        references = tuple(group.references[i] for i in whole)
        if group.target in files:
            exclusions.append(Exclusion("group", group.id, "its target is missing or broken"))
        elif not references:
            exclusions.append(Exclusion("group", group.id, "none of its references can be read"))
        else:
            captions = tuple(group.captions[i] for i in whole) if group.captions else ()
            kept.append(replace(group, references=references, captions=captions))
    return replace(manifest, groups=tuple(kept)), tuple(exclusions)


def _files(group: Group) -> list[tuple[str, Path]]:
    return [*(("reference", file) for file in group.references), ("target", group.target)]


def _fault(file: Path) -> str:
    try:
        open_picture(file)
    except BrokenPicture as error:
        return str(error)
    return ""


def _read_group(position: int, data: Any, folder: Path) -> Group:
    known = data.get("id") if isinstance(data, dict) else None
    where = f"Group {known!r}" if known else f"Group {position} (counted from 0)"
    _check_keys(where, data, GROUP_KEYS, OPTIONAL_GROUP_KEYS)
    for key in ("id", "target", "prompt", "category", "split"):
        _check(where, key, data[key], str)
    _check(where, "references", data["references"], list)
    if not ID.fullmatch(data["id"]):
        raise ValueError(
            f"{where}: its id names a folder; wanted letters, digits, '.', '_' and '-', the first a letter or digit."
        )
    if data["split"] not in SPLITS:
        raise ValueError(f"{where}: split is {data['split']!r}; wanted {' or '.join(map(repr, SPLITS))}.")
    if not data["references"]:
        raise ValueError(f"{where}: references is empty; wanted at least one picture.")
    if not data["category"]:
        raise ValueError(f'{where}: category is empty; wanted a word, such as "style" or "identity".')
    references = tuple(_path(where, "references", file, folder) for file in data["references"])
    target = _path(where, "target", data["target"], folder)
    if target in references:
        raise ValueError(f"{where}: its target {data['target']} is also one of its references.")
    if len(set(references)) < len(references):
        raise ValueError(f"{where}: it names one reference twice.")
    return Group(
        data["id"],
        references,
        target,
        data["prompt"],
        data["category"],
        data["split"],
        _read_captions(where, data["captions"], len(references)) if "captions" in data else (),
        _read_attributes(where, data["attributes"]) if "attributes" in data else None,
    )


def _read_captions(where: str, data: Any, references: int) -> tuple[str, ...]:
    _check(where, "captions", data, list)
    for caption in data:
        _check(f"{where}, captions", "one of them", caption, str)
    if len(data) != references:
        raise ValueError(f"{where} has {len(data)} captions for {references} references; wanted one of each.")
    return tuple(data)


def _read_attributes(where: str, data: Any) -> Attributes:
    where = f"{where}, attributes"
    _check_keys(where, data, ATTRIBUTE_KEYS)
    for key in sorted(ATTRIBUTE_KEYS):
        _check(where, key, data[key], dict)
        for name, value in data[key].items():
            _check(f"{where}, {key}", name, value, str)
    return Attributes(dict(data["shared"]), dict(data["named"]))


def _path(where: str, key: str, file: Any, folder: Path) -> Path:
    _check(where, key, file, str)
    if not file or Path(file).is_absolute():
        raise ValueError(f"{where}: {key} has {file!r}; wanted a path relative to the manifest.")
    return folder / file


def _check(where: str, key: str, value: Any, kind: type) -> None:
    names = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {value!r}; wanted {names[kind]}.")


def _check_keys(where: str, data: Any, required: set[str], optional: set[str] = frozenset()) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r}; wanted an object.")
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    if unknown := sorted(data.keys() - required - optional):
        wanted = ", ".join(sorted(required | optional))
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}. Known are {wanted}.")


def _group_to_dict(group: Group, folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = {
        "id": group.id,
        "references": [_relative(file, folder) for file in group.references],
        "target": _relative(group.target, folder),
        "prompt": group.prompt,
        "category": group.category,
        "split": group.split,
    }
    if group.captions:
        data["captions"] = list(group.captions)
    if group.attributes:
        data["attributes"] = {"shared": dict(group.attributes.shared), "named": dict(group.attributes.named)}
    return data


def _relative(file: Path, folder: Path) -> str:
    """Forward slashes on every system; `..` where the picture lies beside the manifest's folder."""
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
