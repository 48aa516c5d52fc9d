"""method.json: what made a folder of pictures, so that no pictures made otherwise are put beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files.atomic_write import atomic_write_text

if TYPE_CHECKING:
    from torch import Tensor

    from easyref_core.training.base_model import BaseModel

    from .manifest import Group

FILE = "method.json"
ENDS = 32  # values at either end of a tensor that count for its fingerprint
CHUNK = 1 << 16  # bytes at either end of a file that count for a group's

Record = dict[str, Any]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the first and last values of every tensor: training moves every value of what it trains."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().reshape(-1)
        ends = torch.cat([values[:ENDS], values[-ENDS:]]).float().cpu()
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_fingerprint(base: BaseModel) -> str:
    """Of everything in the base model that shows in a picture: weights and noise schedule."""
    parts = [base.unet, base.vae, base.text_encoder, base.text_encoder_2]
    hashes = [fingerprint(part.state_dict()) for part in parts]
    schedule = {key: value for key, value in base.schedule.config.items() if not key.startswith("_")}
    hashes.append(json.dumps(schedule, sort_keys=True, default=str))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def group_digest(group: Group) -> str:
    """Hash of what a method sees of a group: its prompt, and its references and their captions in their order."""
    digest = hashlib.sha256(json.dumps([group.prompt, *group.captions]).encode())
    for path in group.references:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{size}".encode() + file.read(CHUNK))
            file.seek(max(0, size - CHUNK))
            digest.update(file.read(CHUNK))
    return digest.hexdigest()[:16]


def read_record(folder: Path) -> Record | None:
    """The folder's record, None where nothing was painted yet."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Move {folder} away and paint again.") from error


def merge(folder: Path, old: Record | None, new: Record) -> Record:
    """The record after more groups and seeds. Raises ValueError where the two were not made in the same way."""
    new = json.loads(json.dumps(new))  # tuples become lists, as they are read back
    if old is None:
        return new
    found = list(_differences(old, {**new, "seeds": old.get("seeds")}))
    if found:
        shown = "; ".join(f"{name} was {a}, now is {b}" for name, a, b in found[:5])
        raise ValueError(
            f"{folder} holds pictures made with other settings: {shown}. Pictures of two kinds must not be scored as "
            "one method: give this entry another name or output folder, or delete that folder to paint anew."
        )
    groups = old.get("groups", {}) | new["groups"]
    return {**new, "groups": groups, "seeds": sorted({*old.get("seeds", []), *new["seeds"]})}


def write_record(folder: Path, record: Record) -> None:
    """Write it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, old, new) of every value that differs; groups that only one side has do not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = old.keys() & new.keys() if path == "groups" else sorted(old.keys() | new.keys())
        for name in names:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path, json.dumps(old)[:80], json.dumps(new)[:80]
