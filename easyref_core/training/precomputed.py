"""Precomputed outputs of the frozen models, and the checks that they are those of a run.

    latents    mean and standard deviation of a target's latents, and its sizes: of a file
    texts      states and pooled projection of SDXL's text encoders: of a text
    contexts   context states of the MLLM's body: of a reference and a text

A key is a hash of the file's name and size, or of the text. Latents are the VAE's distribution, so a sample
draws from it as it would without them. Augmentation that is drawn anew in each epoch changes the MLLM's
input: context states exist only for single references that are not face crops, and only while the body is
frozen. Dropped references and texts are precomputed too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import fingerprint
from ..files.atomic_write import atomic_write_text
from ..mllm.instructions import INSTRUCTION
from .rows import InvalidRow
from .shards import Shards

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from .base_model import BaseModel
    from .config import Settings
    from .initial import Weights
    from .rows import Row

# Models of the base that each part makes unnecessary while training.
PARTS: dict[str, tuple[str, ...]] = {
    "latents": ("vae",),
    "texts": ("text_encoder", "text_encoder_2"),
    "contexts": (),
}
MANIFEST = "precomputed.json"
BLACK = "black image"  # in place of a file's name in the key of a context


def parts_of(settings: Settings) -> tuple[str, ...]:
    """The parts that can be precomputed for a run: contexts only of a frozen body and whole groups."""
    contexts = settings.stage_spec.body_frozen and settings.aggregation == "easyref"
    return tuple(part for part in PARTS if part != "contexts" or contexts)


def require_parts(settings: Settings, parts: Sequence[str], rows: Sequence[Row]) -> None:
    """Raise ValueError for a part that augmentation or training would change in each epoch."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"{part!r} cannot be precomputed, expected some of {', '.join(PARTS)}.")
    if "contexts" not in parts:
        return
    remedy = "Precompute latents and texts alone: --parts latents,texts."
    if "contexts" not in parts_of(settings):
        raise ValueError(
            f"Stage {settings.stage!r} with aggregation {settings.aggregation!r} cannot use precomputed "
            "context states: expected a stage that freezes the MLLM's body, and aggregation 'easyref'. "
            f"{remedy}"
        )
    for row in rows:
        if row.face or row.target is None or len(row.references) > 1:
            reason = "its face is cropped" if row.face else "its references are shuffled"
            raise ValueError(
                f"line {row.line}: {reason} at random in each epoch, so its context states cannot be "
                f"precomputed. {remedy}"
            )


def file_key(root: Path, file: str) -> str:
    """Key of the latents of an image file."""
    return _key(file, str((root / file).stat().st_size))


def text_key(text: str) -> str:
    """Key of the states of a text."""
    return _key(text)


def context_key(root: Path, file: str | None, text: str) -> str:
    """Key of the context states of a reference and a text; None is the black image."""
    return _key(BLACK if file is None else file_key(root, file), text)


def _key(*contents: str) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(f"{len(content)}|{content}".encode())
    return digest.hexdigest()[:32]


def targets(rows: Sequence[Row]) -> dict[str, None]:
    """Files that can be a target, in order: of a group without a target, each of its images."""
    return dict.fromkeys(file for row in rows for file in ([row.target] if row.target else row.references))


def texts(rows: Sequence[Row]) -> dict[str, None]:
    """All texts, in order; the empty one is that of a dropped text."""
    return dict.fromkeys(["", *(text for row in rows for text in row.texts)])


def contexts(rows: Sequence[Row]) -> dict[tuple[str | None, str], None]:
    """(reference, text) of all context states, in order; None is the black image."""
    return dict.fromkeys(
        (file, text) for row in rows for text in ("", *row.texts) for file in (*row.references, None)
    )


def provenance(
    settings: Settings, base: BaseModel, weights: Weights, frozen_dtype: dtype
) -> dict[str, dict[str, Any]]:
    """The models and settings that each part depends on, as JSON values."""
    rules = settings.data.augmentation
    crops = {
        "resolution": rules.resolution,
        "native": rules.native,
        "apply_exif": settings.data.apply_exif,
    }
    encoders = {
        f"{name}.{key}": tensor
        for name in PARTS["texts"]
        for key, tensor in getattr(base, name).state_dict().items()
    }
    body = [(name, tensor) for name, tensor in weights.tensors.items() if name.startswith("encoder.")]
    mllm = {"size": rules.size, "max_length": rules.max_length, "instruction": INSTRUCTION}
    return {
        "latents": {"vae": fingerprint(base.vae.state_dict().items()), **crops},
        "texts": {"text encoders": fingerprint(encoders.items()), "dtype": str(frozen_dtype)},
        "contexts": {"body": fingerprint(body), "dtype": str(frozen_dtype), **crops, **mllm},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The finished parts of a folder, and the reasons why files and contexts have no entry.

    Raises FileNotFoundError for a folder that `precompute` did not write.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}. Run python -m easyref_core.training precompute with this YAML, or "
            "set precomputed to null."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def write_manifest(folder: Path, parts: Mapping[str, Any], unusable: Mapping[str, str]) -> None:
    atomic_write_text(folder / MANIFEST, json.dumps({"parts": parts, "unusable": unusable}, indent=1))


def require_provenance(folder: Path, current: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if a part of the folder is of other models or settings than `current`."""
    for part, stored in read_manifest(folder)["parts"].items():
        differences = [
            f"{name} was {stored.get(name)!r} and is {value!r}"
            for name, value in current[part].items()
            if stored.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"The {part} in {folder} are precomputed from something else ({'; '.join(differences)}). "
                "Set it back, or precompute into another folder."
            )


class Precomputed:
    """The precomputed parts of a folder, read by the rows' examples.

    Raises FileNotFoundError for another folder, ValueError if entries of `rows` are missing.
    """

    def __init__(self, settings: Settings, rows: Sequence[Row]) -> None:
        manifest = read_manifest(settings.precomputed)
        self.root, self.unusable = settings.data.root, manifest["unusable"]
        self.parts = frozenset(manifest["parts"])
        require_parts(settings, sorted(self.parts), rows)
        self._shards = {part: Shards(settings.precomputed, part) for part in self.parts}
        self._require_complete(settings.precomputed, rows)

    def _require_complete(self, folder: Path, rows: Sequence[Row]) -> None:
        keys = {
            "latents": (file_key(self.root, file) for file in targets(rows)),
            "texts": map(text_key, texts(rows)),
            "contexts": (context_key(self.root, file, text) for file, text in contexts(rows)),
        }
        for part, shards in self._shards.items():
            missing = sum(key not in shards and key not in self.unusable for key in keys[part])
            if missing:
                raise ValueError(
                    f"{folder} lacks {missing} {part} of the rows: rows, texts or images are new. Run "
                    "precompute again with this YAML; it adds them."
                )

    def latents(self, file: str) -> dict[str, Tensor]:
        """moments (2, 4, h, w): mean and standard deviation; sizes (3, 2): original size, crop, target size.

        Raises InvalidRow if the file could not be used.
        """
        return self._entry("latents", file_key(self.root, file))

    def text(self, text: str) -> dict[str, Tensor]:
        """states (N, C) and pooled (P,) of a text."""
        return self._entry("texts", text_key(text))

    def context(self, file: str, text: str, drop_image: bool) -> dict[str, Tensor]:
        """states (S, D), input_ids (S,) and grid (1, 3) of a reference, or of the black image instead."""
        key = context_key(self.root, file, text)
        self._require_usable(key)  # also if its image is dropped, as without precomputed states
        return self._entry("contexts", context_key(self.root, None, text) if drop_image else key)

    def _entry(self, part: str, key: str) -> dict[str, Tensor]:
        self._require_usable(key)
        return self._shards[part][key]

    def _require_usable(self, key: str) -> None:
        if key in self.unusable:
            raise InvalidRow(self.unusable[key])
