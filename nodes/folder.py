"""Reference Group from Folder."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import folder_paths
import node_helpers
from comfy_api.latest import io
from PIL import Image, ImageOps

from ..easyref_core.preprocess import to_rgb
from ..easyref_core.tensor_files import brief
from . import files
from .pictures import image_of
from .references import show_group
from .sockets import EasyRefGroupSocket

if TYPE_CHECKING:
    from torch import Tensor

MOST = 112  # references of one folder; chained folders make larger groups


class EasyRefGroupFromFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupFromFolder",
            display_name="Reference Group from Folder",
            category="EasyRef",
            description="The pictures of a folder inside ComfyUI's input folder as one group, in the order of their "
            "names (2 before 10). Each keeps its size. Files that are no pictures are passed over.",
            search_aliases=["load images from folder", "image directory", "batch load references"],
            inputs=[
                io.String.Input(
                    "folder",
                    tooltip="Its path inside ComfyUI's input folder, such as faces/anna. A dot is the input folder itself.",
                ),
                io.Int.Input(
                    "limit",
                    default=16,
                    min=1,
                    max=MOST,
                    tooltip="How many pictures to take at most.",
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=100_000,
                    advanced=True,
                    tooltip="How many pictures to pass over before the first one that is taken.",
                ),
                EasyRefGroupSocket.Input(
                    "group",
                    optional=True,
                    tooltip="A group to extend: the pictures of the folder come after its references.",
                ),
            ],
            outputs=[
                EasyRefGroupSocket.Output(display_name="group", tooltip="The references, in order."),
                io.String.Output(
                    display_name="names", tooltip="The names of the files that were taken, one a line."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, limit: int | None, start: int | None, **_: object) -> str:
        """Other files, or files of other content, are another group."""
        if folder is None or limit is None or start is None:  # linked: not known yet
            return ""
        try:
            found = pictures_in(folder, start, limit)
            return " ".join([*(file.name for file in found), files.state_of(found)])
        except (OSError, ValueError) as error:  # execute says it
            return str(error)

    @classmethod
    def execute(
        cls, folder: str, limit: int, start: int, group: tuple[Tensor, ...] | None = None
    ) -> io.NodeOutput:
        found = pictures_in(folder, start, limit)
        taken, names, notes = [], [], []
        for file in found:
            try:
                taken.append(read(file))
                names.append(file.name)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                notes.append(f"Warning: {file.name} was left out, it could not be read ({error}).")
        if not taken:
            raise ValueError(
                f"No picture was found in {brief(repr(folder))} of the input folder "
                f"({len(found)} files tried, from number {start} on). Put pictures there, or give another folder. {' '.join(notes)}".rstrip()
            )
        references = (*(group or ()), *taken)
        return io.NodeOutput(references, "\n".join(names), ui=show_group(references, notes))


def pictures_in(folder: str, start: int, limit: int) -> list[Path]:
    """The picture files to take, in the order of their names.

    Raises ValueError for a folder that is not inside the input folder, FileNotFoundError where there is none.
    """
    base = Path(folder_paths.get_input_directory()).resolve()
    path = inside(base, folder)
    if not path.is_dir():
        there = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
        raise FileNotFoundError(
            f"There is no folder {brief(repr(folder))} in {base}. Give one that is. Folders there: {', '.join(there) or 'none'}."
        )
    names = folder_paths.filter_files_content_types(
        [entry.name for entry in path.iterdir() if entry.is_file()], ["image"]
    )
    chosen = sorted(names, key=natural)[start : start + limit]
    return [inside(base, str(Path(folder, name))) for name in chosen]


def inside(base: Path, relative: str) -> Path:
    """The file or folder at a relative path, followed through links. Raises ValueError if it is not inside `base`."""
    try:
        path = (base / relative).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # no name at all: too long, with a NUL, a link to itself
        path = None
    absolute = Path(relative).is_absolute() or PureWindowsPath(relative).drive
    if path is None or not relative.strip() or absolute or not path.is_relative_to(base):
        raise ValueError(
            f"{brief(repr(relative))} is not inside ComfyUI's input folder ({base}). Give a path relative to it; links that lead "
            "out of it are not followed."
        )
    return path


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts as people count: image2 before image10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def read(file: Path) -> Tensor:
    """A picture file as (1, height, width, 3) in 0..1, turned as its EXIF data says; the first one of an animation."""
    image = node_helpers.pillow(Image.open, file)
    image = node_helpers.pillow(ImageOps.exif_transpose, image)
    return image_of(to_rgb(image))
