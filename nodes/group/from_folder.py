"""Reference Group from Folder."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import folder_paths
import node_helpers
from comfy_api.latest import io
from PIL import ImageOps

from ...easyref_core.files.image_files import SortedFiles, no_reader_reason, open_image, sort_files
from ...easyref_core.mllm.preprocess import to_rgb
from ...easyref_core.utils.errors import shorten
from ..host import folders
from ..host.file_changes import FileChanges
from ..host.images import image_of
from ..host.socket_types import EasyRefGroupSocket
from ..host.validation import validates_inputs
from .reference_group import show_group

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MOST = 112  # references of one folder; chained folders make larger groups
NAMED = 8  # files that one line of the report names; it counts the rest


@validates_inputs
class EasyRefGroupFromFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupFromFolder",
            display_name="Reference Group from Folder",
            category="EasyRef",
            description="The pictures of a folder inside ComfyUI's input folder as one group, in the order of their "
            "names (2 before 10). Each keeps its size. The node names the files that it leaves out, with the reason.",
            search_aliases=["load images from folder", "image directory", "batch load references"],
            is_output_node=True,
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
    def validate_inputs(cls, folder: str | None) -> bool | str:
        """Refuse a path outside the input folder, such as an empty one; None: it comes through a link.

        An output node that failed while it runs would stop the other nodes.
        """
        try:
            if folder is not None:
                inside(Path(folder_paths.get_input_directory()).resolve(), folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, limit: int | None, start: int | None, **_: object) -> str:
        """Other folders, or files of other content, are another group."""
        return FILES.fingerprint(folder, limit, start)

    @classmethod
    def execute(
        cls, folder: str, limit: int, start: int, group: tuple[Tensor, ...] | None = None
    ) -> io.NodeOutput:
        FILES.record(folder, limit, start)
        found = sorted_files(folder)
        tried = pictures_in(folder, found.readable[start : start + limit])
        taken, names, notes = [], [], []
        for file in tried:
            try:
                taken.append(read(file))
                names.append(file.name)
            except Exception as error:  # Pillow's decoders raise errors of every kind for foreign bytes
                reason = shorten(error) or type(error).__name__
                notes.append(f"Warning: {shorten(file.name)} was left out, it could not be read ({reason}).")
        notes += left_out(found) + beyond_the_limit(len(found.readable), start, limit)
        if not taken:
            raise ValueError(
                f"No picture was found in {shorten(repr(folder))} of the input folder "
                f"({len(tried)} files tried, from number {start} on). Put pictures there, or give another folder. {' '.join(notes)}".rstrip()
            )
        references = (*(group or ()), *taken)
        return io.NodeOutput(references, "\n".join(names), ui=show_group(references, notes))


def sorted_files(folder: str) -> SortedFiles:
    """Names of the files in a folder, in the order of their names.

    Raises ValueError for a folder that is not inside the input folder, FileNotFoundError if it does not exist.
    """
    base = Path(folder_paths.get_input_directory()).resolve()
    path = inside(base, folder)
    if not path.is_dir():
        there = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
        raise FileNotFoundError(
            f"There is no folder {shorten(repr(folder))} in {base}. Give one that is. Folders there: {', '.join(there) or 'none'}."
        )
    return sort_files(sorted((entry.name for entry in path.iterdir() if entry.is_file()), key=natural))


def pictures_in(folder: str, names: list[str]) -> list[Path]:
    """Full paths of image files in a folder. Raises ValueError for a link that leads out of the input folder."""
    base = Path(folder_paths.get_input_directory()).resolve()
    return [inside(base, str(Path(folder, name))) for name in names]


def left_out(found: SortedFiles) -> list[str]:
    """Lines of the report that name the files which are not read, with the reason. Hidden files are not named."""
    by_reason: dict[str, list[str]] = {}
    for name in found.no_reader:
        by_reason.setdefault(no_reader_reason(name), []).append(name)
    lines = [f"Warning: left out, {reason}: {listed(names)}." for reason, names in by_reason.items()]
    if visible := [name for name in found.other if not name.startswith(".")]:
        lines.append(f"Left out, not an image: {listed(visible)}.")
    return lines


def beyond_the_limit(count: int, start: int, limit: int) -> list[str]:
    """A line that says how many of `count` images are outside the window that start and limit give."""
    outside = count - len(range(count)[start : start + limit])
    return [f"{outside} of {count} images were not taken (start {start}, limit {limit})."] if outside else []


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shorten, names[:NAMED])) + more


def state_of(folder: str, limit: int, start: int) -> str:
    """Names and states of the files to take, and names of those that are reported. Raises as pictures_in does."""
    found = sorted_files(folder)
    taken = pictures_in(folder, found.readable[start : start + limit])
    return " ".join([*(file.name for file in taken), folders.state_of(taken), *found.no_reader])


FILES = FileChanges(state_of)


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
            f"{shorten(repr(relative))} is not inside ComfyUI's input folder ({base}). Give a path relative to it; links that lead "
            "out of it are not followed."
        )
    return path


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts as people count: image2 before image10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def read(file: Path) -> Tensor:
    """A picture file as (1, height, width, 3) in 0..1, turned as its EXIF data says; the first one of an animation."""
    image: Image.Image = node_helpers.pillow(open_image, file)
    image = node_helpers.pillow(ImageOps.exif_transpose, image)
    return image_of(to_rgb(image))
