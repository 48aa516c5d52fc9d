"""Reference Group from Folder."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageOps, UnidentifiedImageError

from .sockets import EasyRefGroupSocket

if TYPE_CHECKING:
    from torch import Tensor

HERE = "."  # the input folder itself
DEEPEST = 3  # levels of folders that are listed
MOST = 112  # references of one group


class EasyRefGroupFromFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupFromFolder",
            display_name="Reference Group from Folder",
            category="EasyRef",
            description="All images of a folder inside ComfyUI's input folder as one group, in the order of their names "
            "(2 before 10). What is no image is left out.",
            search_aliases=["load images", "image folder", "references", "batch"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folders(),
                    tooltip="A folder inside ComfyUI/input; press R after you made a new one.",
                ),
                io.Int.Input(
                    "skip",
                    default=0,
                    min=0,
                    max=100_000,
                    advanced=True,
                    tooltip="How many images to leave out first.",
                ),
                io.Int.Input(
                    "limit",
                    default=8,
                    min=1,
                    max=MOST,
                    tooltip="How many references the folder gives at most.",
                ),
                EasyRefGroupSocket.Input(
                    "group",
                    optional=True,
                    tooltip="A group to extend: the folder's images come after its references.",
                ),
            ],
            outputs=[EasyRefGroupSocket.Output(display_name="group", tooltip="The references, in order.")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: object) -> str:
        """Other files are another group."""
        return " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files(folder))

    @classmethod
    def execute(
        cls, folder: str, skip: int, limit: int, group: tuple[Tensor, ...] | None = None
    ) -> io.NodeOutput:
        found = (picture for file in files(folder) if (picture := read(file)) is not None)
        pictures = tuple(islice(found, skip, skip + limit))
        if not pictures:
            raise ValueError(
                f"The folder {folder!r} inside {folder_paths.get_input_directory()} holds no image after the first {skip}. "
                "Put images there, or skip fewer."
            )
        return io.NodeOutput((*(group or ()), *pictures))


def folders() -> list[str]:
    """Folders inside the input folder, as paths relative to it."""
    root = Path(folder_paths.get_input_directory())
    below = (
        [path for path in root.rglob("*") if path.is_dir() and _is_inside(path, root)]
        if root.is_dir()
        else []
    )
    names = [path.relative_to(root).as_posix() for path in below]
    return [HERE, *sorted(name for name in names if name.count("/") < DEEPEST)]


def files(folder: str) -> list[Path]:
    """The files of a listed folder in natural order. Raises FileNotFoundError for one that is not listed."""
    root = Path(folder_paths.get_input_directory())
    if folder not in folders():
        raise FileNotFoundError(
            f"There is no folder {folder!r} inside {root}; there are: {', '.join(folders()[1:]) or 'none'}."
        )
    inside = [file for file in (root / folder).iterdir() if file.is_file() and _is_inside(file, root)]
    return sorted(inside, key=lambda file: _natural(file.name))


def read(file: Path) -> Tensor | None:
    """An image file as (1, height, width, 3) in 0..1, turned as its EXIF says; None for what is no image.

    Raises ValueError for an image that is broken.
    """
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image {file.name} cannot be read ({error}). Replace it, or take it away."
        ) from error
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a path is below the folder, links followed."""
    return path.resolve().is_relative_to(root.resolve())


def _natural(name: str) -> list[tuple[int, str]]:
    """2 before 10: numbers by their value, the rest without regard to case."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name.lower())]
