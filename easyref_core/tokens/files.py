"""Files of reference tokens: conditional and unconditional tokens, provenance, thumbnails; no pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

from ..files.atomic_write import atomic_write
from ..mllm.context import Provenance
from ..utils.errors import shorten
from ..utils.images import to_rgb
from .reference_tokens import ReferenceTokens

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "easyref_tokens"  # identifies the format, whatever the file's name
FORMAT = 1
VERSION = "0.1.0"  # of this pack, as in pyproject.toml
BRANCHES = ("conditional", "unconditional")
THUMBNAILS = "thumbnails"
THUMBNAIL_SHAPE = (64, 64, 3)  # height, width, channels
MAX_DEPTH = 100  # combinations of combinations; the parser is recursive


@dataclasses.dataclass(frozen=True)
class SavedTokens:
    """The content of a file: tokens (B, T, C) in float32, and thumbnails (K, 64, 64, 3) in bytes, K >= 0."""

    conditional: ReferenceTokens
    unconditional: ReferenceTokens
    thumbnails: Tensor


def save_tokens(
    path: Path | str,
    conditional: ReferenceTokens,
    unconditional: ReferenceTokens,
    references: Sequence[Image.Image | Tensor] = (),
) -> None:
    """Write conditional and unconditional tokens as one safetensors file. The write is atomic.

    references: PIL images or (H, W, C) float tensors in 0..1, saved as thumbnails. Raises TypeError for plain
    tensors, ValueError for conditional and unconditional tokens that do not belong together.
    """
    from safetensors.torch import save_file

    path, pair = Path(path), dict(zip(BRANCHES, (conditional, unconditional), strict=True))
    for branch, tokens in pair.items():
        if not isinstance(tokens, ReferenceTokens):
            raise TypeError(
                f"The {branch} tokens are a {type(tokens).__name__}; wanted ReferenceTokens, which have a "
                "provenance."
            )
    _require_pair(path, pair)
    # contiguous, and a copy, because safetensors refuses tensors that share memory
    tensors = {
        branch: tokens.detach().to("cpu", torch.float32, copy=True).contiguous()
        for branch, tokens in pair.items()
    }
    if len(references):
        tensors[THUMBNAILS] = torch.stack([thumbnail_tensor(image) for image in references])
    about = {"version": FORMAT, "pack": VERSION}
    about |= {branch: dataclasses.asdict(tokens.provenance) for branch, tokens in pair.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, {METADATA_KEY: json.dumps(about), "format": "pt"})


def load_tokens(path: Path | str) -> SavedTokens:
    """Load a file that `save_tokens` wrote.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give the path of a file that save_tokens wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            about = _parse_metadata(path, file.metadata() or {}, names)
            # copied, because a mapping would keep the file from being replaced
            tensors = {name: file.get_tensor(name).clone() for name in names & {*BRANCHES, THUMBNAILS}}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file: {shorten(error)} ({path.stat().st_size:,} bytes on "
            "disk). It was cut short or is of another format; save the tokens again."
        ) from error
    provenances = {branch: _parse_provenance(path, branch, about.get(branch)) for branch in BRANCHES}
    _require_valid(path, tensors)
    pair = {b: ReferenceTokens.of(tensors[b].float(), provenance) for b, provenance in provenances.items()}
    _require_pair(path, pair)
    no_thumbnails = torch.zeros(0, *THUMBNAIL_SHAPE, dtype=torch.uint8)
    return SavedTokens(**pair, thumbnails=tensors.get(THUMBNAILS, no_thumbnails))


def thumbnail_tensor(image: Image.Image | Tensor) -> Tensor:
    """A small copy of a reference at its own aspect, on black: (64, 64, 3) in bytes."""
    small = ImageOps.pad(to_rgb(image), THUMBNAIL_SHAPE[:2], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small))


def _parse_metadata(path: Path, metadata: Mapping[str, str], names: set[str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata or not names >= set(BRANCHES):
        raise ValueError(
            f"{path} is not a file of reference tokens: it holds {len(names)} tensors"
            + (f" such as {shorten(', '.join(sorted(names)[:3]))}" if names else "")
            + f"; wanted {' and '.join(BRANCHES)}, and {METADATA_KEY} in the metadata, as Save Reference "
            "Tokens writes."
        )
    try:
        about = json.loads(metadata[METADATA_KEY])
        version = about["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged_error(path, f"its metadata is {shorten(repr(metadata[METADATA_KEY]))}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {shorten(repr(version))}, written by version "
            f"{shorten(repr(about.get('pack')))} of this pack; this is version {VERSION}, which reads format "
            f"{FORMAT}. Update the pack, or save the tokens again."
        )
    return about


def _parse_provenance(path: Path, branch: str, about: Any, depth: int = 0) -> Provenance:
    """A Provenance from its dictionary, without the fields of later versions. depth: of the combination."""
    if depth > MAX_DEPTH:
        raise _damaged_error(path, f"the {branch} tokens were combined more than {MAX_DEPTH} times")
    fields = {field.name for field in dataclasses.fields(Provenance)}
    try:
        values = {name: _as_tuple(value) for name, value in about.items() if name in fields}
        parts = tuple(_parse_provenance(path, branch, part, depth + 1) for part in about.get("parts", ()))
        provenance = Provenance(**{**values, "parts": parts})
    except (TypeError, AttributeError, RecursionError) as error:
        raise _damaged_error(path, f"the provenance of the {branch} tokens is {shorten(about)}") from error
    kinds = {"checkpoint": str, "instruction": str, "prompt": str, "references": int, "size": int, "how": str}
    for name, kind in kinds.items():
        value = getattr(provenance, name)
        if not isinstance(value, kind) or not _is_valid(value):
            raise _damaged_error(path, f"{name} of the {branch} tokens is {shorten(repr(value))}")
    return provenance


def _is_valid(value: str | int) -> bool:
    """Return True for a text without surrogates and for a count."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, bool) and 0 <= value < 2**31


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _require_valid(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for branch in BRANCHES:
        tokens = tensors[branch]
        if tokens.ndim != 3 or not tokens.numel() or not tokens.is_floating_point():
            raise _damaged_error(
                path,
                f"the {branch} tokens are {shorten(tuple(tokens.shape))} of {tokens.dtype}; wanted (rows, "
                "tokens, width) of floats",
            )
        if not torch.isfinite(tokens.float()).all():  # a finite float64 may overflow in float32
            raise _damaged_error(path, f"the {branch} tokens hold values that are NaN or infinite")
    images = tensors.get(THUMBNAILS)
    if images is not None and (images.shape[1:] != THUMBNAIL_SHAPE or images.dtype != torch.uint8):
        raise _damaged_error(path, f"the thumbnails are {shorten(tuple(images.shape))} of {images.dtype}")


def _require_pair(path: Path, pair: Mapping[str, ReferenceTokens]) -> None:
    """Raises ValueError for different checkpoints, token counts or widths. One branch may have 1 row."""
    shapes = [tuple(pair[branch].shape) for branch in BRANCHES]
    (rows, *sizes), (other_rows, *other_sizes) = shapes
    if sizes != other_sizes or (rows != other_rows and 1 not in (rows, other_rows)):
        raise ValueError(
            f"{path}: the conditional tokens are {shapes[0]}, the unconditional ones {shapes[1]}; wanted as "
            "many of one width in both. Combine both in the same way."
        )
    checkpoints = [shorten(pair[branch].provenance.checkpoint) for branch in BRANCHES]
    if pair[BRANCHES[0]].provenance.checkpoint != pair[BRANCHES[1]].provenance.checkpoint:
        raise ValueError(
            f"{path}: the conditional and the unconditional tokens are of different EasyRef checkpoints "
            f"({checkpoints[0]} and {checkpoints[1]}). Use tokens of one checkpoint."
        )


def _damaged_error(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path} is a damaged file of reference tokens: {fault}. Save the tokens again.")
