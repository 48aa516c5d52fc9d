"""method.json: provenance of generated images, so that images made differently are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.atomic_write import atomic_write_text

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.base_model import BaseModel
    from .manifest import Group

FILE = "method.json"
END_BYTES = 1 << 16  # hashed at either end of a reference's file

Record = dict[str, Any]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the first and last values of every tensor; training changes every value of a trained tensor."""
    from ..checkpoint.checkpoint import end_values

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + end_values(tensors[name]))
    return digest.hexdigest()[:16]


def base_fingerprint(base: BaseModel) -> str:
    """Hash of everything in the base model that changes an image: weights and noise schedule."""
    parts = [base.unet, base.vae, base.text_encoder, base.text_encoder_2]
    hashes = [fingerprint(part.state_dict()) for part in parts]
    schedule = {key: value for key, value in base.schedule.config.items() if not key.startswith("_")}
    hashes.append(json.dumps(schedule, sort_keys=True, default=str))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def group_digest(group: Group) -> str:
    """Hash of a method's inputs: the prompt, and the references and their captions in order."""
    digest = hashlib.sha256(json.dumps([group.prompt, *group.captions]).encode())
    for path in group.references:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{size}".encode() + file.read(END_BYTES))
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()[:16]


def read_record(folder: Path) -> Record | None:
    """Load the folder's record; None if it has none."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Move {folder} away and generate again.") from error


def merge(folder: Path, old: Record | None, new: Record) -> Record:
    """Return the record with the groups and seeds of both.

    Raises ValueError if any other setting differs, or a group's inputs have changed.
    """
    new = json.loads(json.dumps(new))  # tuples become lists, as in the file
    if old is None:
        return new
    differences = list(_differences(old, {**new, "seeds": old.get("seeds")}))
    if differences:
        shown = "; ".join(f"{name} was {a}, now is {b}" for name, a, b in differences[:5])
        raise ValueError(
            f"{folder} holds images made with other settings: {shown}. Images made differently must not be "
            "scored as one method: give this entry another name or output folder, or delete that folder to "
            "generate again."
        )
    groups = old.get("groups", {}) | new["groups"]
    return {**new, "groups": groups, "seeds": sorted({*old.get("seeds", []), *new["seeds"]})}


def write_record(folder: Path, record: Record) -> None:
    """Write the record atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, old, new) of every value that differs, except groups that only one side has."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = old.keys() & new.keys() if path == "groups" else sorted(old.keys() | new.keys())
        for name in names:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path, json.dumps(old)[:80], json.dumps(new)[:80]
