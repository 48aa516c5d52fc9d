"""Node Reference Group from Folder: image files of a folder -> reference group."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import folder_paths
import node_helpers
from comfy_api.latest import io
from PIL import ImageOps

from ...easyref_core.files.image_files import SortedFiles, no_reader_reason, open_image, sort_files
from ...easyref_core.utils.errors import shorten
from ...easyref_core.utils.images import to_rgb
from ..host import folders
from ..host.file_changes import FileChanges
from ..host.images import ReferenceGroup, split_group, to_tensor
from ..host.socket_types import EasyRefGroupSocket
from ..host.validation import validates_inputs
from .summary import group_preview

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MAX_REFERENCES = 112  # of one folder; chained folders make larger groups
MAX_NAMES = 8  # files that one note names; it counts the rest


@validates_inputs
class EasyRefGroupFromFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroupFromFolder",
            display_name="Reference Group from Folder",
            category="EasyRef",
            description="Loads the images of a folder inside ComfyUI's input folder as a group, sorted by "
            "name (2 before 10). Each keeps its size. The node names the files that it leaves out, with the "
            "reason.",
            search_aliases=["load images from folder", "image directory", "batch load references"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "folder",
                    tooltip="Path inside ComfyUI's input folder, such as faces/anna. A dot is the input "
                    "folder.",
                ),
                io.Int.Input(
                    "limit",
                    default=16,
                    min=1,
                    max=MAX_REFERENCES,
                    tooltip="Maximum number of images to load.",
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=100_000,
                    advanced=True,
                    tooltip="Number of images to skip before the first one that is loaded.",
                ),
                EasyRefGroupSocket.Input(
                    "group",
                    optional=True,
                    tooltip="A group to extend: the images of the folder come after its references.",
                ),
            ],
            outputs=[
                EasyRefGroupSocket.Output(display_name="group", tooltip="The references, in order."),
                io.String.Output(
                    display_name="names", tooltip="Names of the files that were loaded, one per line."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        """Refuse a path outside the input folder, such as an empty one.

        folder is None if it comes through a link. The path is refused here, because an output node that fails
        while it runs stops the other nodes.
        """
        try:
            if folder is not None:
                resolve_inside(input_folder(), folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, limit: int | None, start: int | None, **_: object) -> str:
        """Return a fingerprint of the folder's files: other files, or other content, are another group."""
        return FILES.fingerprint(folder, limit, start)

    @classmethod
    def execute(
        cls, folder: str, limit: int, start: int, group: tuple[Tensor, ...] | None = None
    ) -> io.NodeOutput:
        FILES.record(folder, limit, start)
        files = sorted_files(folder)
        window = image_paths(folder, files.readable[start : start + limit])
        images, names, notes = [], [], []
        for path in window:
            try:
                images.append(load_image(path))
                names.append(path.name)
            except Exception as error:  # Pillow's decoders raise errors of every kind for foreign bytes
                reason = shorten(error) or type(error).__name__
                notes.append(f"Warning: {shorten(path.name)} was left out, it could not be read ({reason}).")
        notes += skipped_notes(files) + window_notes(len(files.readable), start, limit)
        if not images:
            tried = f"{len(window)} files tried, from number {start} on"
            raise ValueError(
                f"No picture was found in {shorten(repr(folder))} of the input folder ({tried}). Put "
                f"pictures there, or give another folder. {' '.join(notes)}".rstrip()
            )
        references = ReferenceGroup.joined([split_group(group or ()), ReferenceGroup(images)])
        return io.NodeOutput(references, "\n".join(names), ui=group_preview(references, notes))


def sorted_files(folder: str) -> SortedFiles:
    """Return the names of the files in a folder, in natural order.

    Raises ValueError for a folder outside the input folder, FileNotFoundError if it does not exist.
    """
    base = input_folder()
    path = resolve_inside(base, folder)
    if not path.is_dir():
        others = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
        raise FileNotFoundError(
            f"Folder {shorten(repr(folder))} does not exist in {base}. Give the path of an existing one. "
            f"Folders there: {', '.join(others) or 'none'}."
        )
    return sort_files(sorted((entry.name for entry in path.iterdir() if entry.is_file()), key=natural_key))


def image_paths(folder: str, names: list[str]) -> list[Path]:
    """Return the full paths of files in a folder. Raises ValueError for a link out of the input folder."""
    base = input_folder()
    return [resolve_inside(base, str(Path(folder, name))) for name in names]


def skipped_notes(files: SortedFiles) -> list[str]:
    """Return notes that name the files which are not read, with the reason; hidden files are not named."""
    by_reason: dict[str, list[str]] = {}
    for name in files.no_reader:
        by_reason.setdefault(no_reader_reason(name), []).append(name)
    notes = [f"Warning: left out, {reason}: {join_names(names)}." for reason, names in by_reason.items()]
    if visible := [name for name in files.other if not name.startswith(".")]:
        notes.append(f"Left out, not an image: {join_names(visible)}.")
    return notes


def window_notes(count: int, start: int, limit: int) -> list[str]:
    """Return a note with the number of images outside the window of start and limit, if any."""
    outside = count - len(range(count)[start : start + limit])
    return [f"{outside} of {count} images were not taken (start {start}, limit {limit})."] if outside else []


def join_names(names: list[str]) -> str:
    """Join the first names, and add the number of the rest."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(shorten, names[:MAX_NAMES])) + more


def state_of(folder: str, limit: int, start: int) -> str:
    """Return names and states of the files to load, and the names in the notes. Raises as image_paths."""
    files = sorted_files(folder)
    paths = image_paths(folder, files.readable[start : start + limit])
    return " ".join([*(path.name for path in paths), folders.state_of(paths), *files.no_reader])


FILES = FileChanges(state_of)


def input_folder() -> Path:
    """Return ComfyUI's input folder, with links resolved."""
    return Path(folder_paths.get_input_directory()).resolve()


def resolve_inside(base: Path, relative: str) -> Path:
    """Resolve a relative path, links included. Raises ValueError if it is not inside `base`."""
    try:
        path = (base / relative).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):  # an invalid name: too long, with a NUL, a link to itself
        path = None
    absolute = Path(relative).is_absolute() or PureWindowsPath(relative).drive
    if path is None or not relative.strip() or absolute or not path.is_relative_to(base):
        raise ValueError(
            f"{shorten(repr(relative))} is not inside ComfyUI's input folder ({base}). Give a path relative "
            "to it; links that lead out of it are not followed."
        )
    return path


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return the sort key of natural order: image2 before image10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def load_image(path: Path) -> Tensor:
    """Load an image file, or an animation's first frame, as (1, H, W, 3) in 0..1, oriented by EXIF."""
    image: Image.Image = node_helpers.pillow(open_image, path)
    image = node_helpers.pillow(ImageOps.exif_transpose, image)
    return to_tensor(to_rgb(image))
