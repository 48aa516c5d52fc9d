"""Reference tokens as files: both sides, what made them, and small pictures of the references. No code, no pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..files.atomic_write import atomic_write
from ..mllm.preprocess import to_rgb
from ..utils.errors import shorten
from .reference_tokens import Provenance, ReferenceTokens

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

METADATA_KEY = "easyref_tokens"  # by which a file is known, whatever it is called
FORMAT = 1
VERSION = "0.1.0"  # of this pack, as in pyproject.toml
SIDES = ("conditional", "unconditional")
THUMBNAILS = "thumbnails"
THUMBNAIL = 64  # pixels
DEEPEST = 100  # combinations of combinations; reading them takes a stack that has an end


@dataclasses.dataclass(frozen=True)
class SavedTokens:
    """What a file holds: tokens (B, T, C) of both sides in float32, and thumbnails (K, 64, 64, 3) in bytes, K 0 or more."""

    conditional: ReferenceTokens
    unconditional: ReferenceTokens
    thumbnails: Tensor


def save_tokens(
    path: Path | str,
    conditional: ReferenceTokens,
    unconditional: ReferenceTokens,
    references: Sequence[Image.Image | Tensor] = (),
) -> None:
    """Write the tokens of both sides as one safetensors file; it appears whole or not at all.

    references: PIL images or (H, W, C) float tensors in 0..1, to be kept as thumbnails.
    Raises TypeError for tokens that do not say what made them, ValueError for two sides that do not belong together.
    """
    from safetensors.torch import save_file

    path, sides = Path(path), dict(zip(SIDES, (conditional, unconditional), strict=True))
    for side, tokens in sides.items():
        if not isinstance(tokens, ReferenceTokens):
            raise TypeError(
                f"The {side} tokens are a {type(tokens).__name__}; wanted ReferenceTokens, which say what "
                "made them."
            )
    made = {side: tokens.provenance for side, tokens in sides.items()}
    _require_a_pair(str(path), {side: tuple(t.shape) for side, t in sides.items()}, made)
    tensors = {side: tokens.detach().to("cpu", torch.float32, copy=True) for side, tokens in sides.items()}
    if len(references):
        tensors[THUMBNAILS] = torch.stack([thumbnail(image) for image in references])
    about = {"version": FORMAT, "pack": VERSION}
    about |= {side: dataclasses.asdict(provenance) for side, provenance in made.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, {METADATA_KEY: json.dumps(about), "format": "pt"})


def load_tokens(path: Path | str) -> SavedTokens:
    """Read what `save_tokens` wrote.

    Raises FileNotFoundError, or ValueError for a file that is damaged, something else, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give the path of a file that save_tokens wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            about = _read_about(path, file.metadata() or {}, names)
            # copied, so that no mapping keeps the file from being replaced
            found = {name: file.get_tensor(name).clone() for name in names & {*SIDES, THUMBNAILS}}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file: {shorten(error)} ({path.stat().st_size:,} bytes on "
            "disk). It was cut short or is of another format; save the tokens again."
        ) from error
    made = {side: _read_provenance(path, side, about.get(side)) for side in SIDES}
    _check_tensors(path, found)
    _require_a_pair(str(path), {side: tuple(found[side].shape) for side in SIDES}, made)
    tokens = (ReferenceTokens.of(found[side].float(), made[side]) for side in SIDES)
    none = torch.zeros(0, THUMBNAIL, THUMBNAIL, 3, dtype=torch.uint8)
    return SavedTokens(*tokens, found.get(THUMBNAILS, none))


def thumbnail(image: Image.Image | Tensor) -> Tensor:
    """A reference as a small picture at its own aspect, on black: (64, 64, 3) in bytes."""
    import numpy as np
    from PIL import Image, ImageOps

    small = ImageOps.pad(to_rgb(image), (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small))


def _read_about(path: Path, metadata: Mapping[str, str], names: set[str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata or not names >= set(SIDES):
        raise ValueError(
            f"{path} is not a file of reference tokens: it holds {len(names)} tensors"
            + (f" such as {shorten(', '.join(sorted(names)[:3]))}" if names else "")
            + f"; wanted {' and '.join(SIDES)}, and {METADATA_KEY} in the metadata, as Save Reference Tokens writes."
        )
    try:
        about = json.loads(metadata[METADATA_KEY])
        version = about["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"its metadata is {shorten(repr(metadata[METADATA_KEY]))}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {shorten(repr(version))}, written by version "
            f"{shorten(repr(about.get('pack')))} of this pack; this is version {VERSION}, which reads format "
            f"{FORMAT}. Update the pack, or save the tokens again."
        )
    return about


def _read_provenance(path: Path, side: str, about: Any, depth: int = 0) -> Provenance:
    """A Provenance from its dictionary; what a later version adds to it is left out. depth: combinations it is inside."""
    if depth > DEEPEST:
        raise _damaged(path, f"what made the {side} tokens was combined more than {DEEPEST} times")
    fields = {field.name for field in dataclasses.fields(Provenance)}
    try:
        values = {name: _as_tuple(value) for name, value in about.items() if name in fields}
        parts = tuple(_read_provenance(path, side, part, depth + 1) for part in about.get("parts", ()))
        made = Provenance(**{**values, "parts": parts})
    except (TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"what made the {side} tokens is {shorten(about)}") from error
    kinds = {"checkpoint": str, "instruction": str, "prompt": str, "references": int, "size": int, "how": str}
    for name, kind in kinds.items():
        if not isinstance(getattr(made, name), kind) or not _fits(getattr(made, name)):
            raise _damaged(path, f"{name} of the {side} tokens is {shorten(repr(getattr(made, name)))}")
    return made


def _fits(value: str | int) -> bool:
    """A text without halves of characters, a count that is one."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, bool) and 0 <= value < 2**31


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _check_tensors(path: Path, found: Mapping[str, Tensor]) -> None:
    for side in SIDES:
        tokens = found[side]
        if tokens.ndim != 3 or not tokens.numel() or not tokens.is_floating_point():
            raise _damaged(
                path,
                f"the {side} tokens are {shorten(tuple(tokens.shape))} of {tokens.dtype}; wanted (rows, "
                "tokens, width) of floats",
            )
        if not torch.isfinite(tokens.float()).all():  # what is finite as float64 may not be as float32
            raise _damaged(path, f"the {side} tokens hold values that are NaN or infinite")
    pictures = found.get(THUMBNAILS)
    wanted = (THUMBNAIL, THUMBNAIL, 3)
    if pictures is not None and (tuple(pictures.shape[1:]) != wanted or pictures.dtype != torch.uint8):
        raise _damaged(path, f"the thumbnails are {shorten(tuple(pictures.shape))} of {pictures.dtype}")


def _require_a_pair(name: str, shapes: Mapping[str, tuple[int, ...]], made: Mapping[str, Provenance]) -> None:
    """Both sides are for one checkpoint and have as many tokens, of one width; rows may differ if one side has 1."""
    (rows, *ours), (other_rows, *others) = (shapes[side] for side in SIDES)
    if ours != others or (rows != other_rows and 1 not in (rows, other_rows)):
        raise ValueError(
            f"{name}: the conditional tokens are {shapes[SIDES[0]]}, the unconditional ones "
            f"{shapes[SIDES[1]]}; wanted as many of one width on both sides. Combine both sides in the same "
            "way."
        )
    if made[SIDES[0]].checkpoint != made[SIDES[1]].checkpoint:
        raise ValueError(
            f"{name}: the two sides were made by different EasyRef checkpoints "
            f"({shorten(made[SIDES[0]].checkpoint)} and {shorten(made[SIDES[1]].checkpoint)}). Make both "
            "with one."
        )


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is a damaged file of reference tokens: {what}. Save the tokens again.")
