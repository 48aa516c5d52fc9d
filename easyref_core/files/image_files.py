"""Image files: which of them Pillow can read here, and how they are opened.

Pillow is asked, not the operating system: its table of file types differs from machine to machine. Readers that a
Pillow plugin registers in this process (HEIF, JPEG XL, ...) count.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

# Formats that are never read: EPS because Pillow starts Ghostscript for it, IPTC because it opens any format inside it
# (EPS included), the others because they hold films or tables, for which Pillow has no decoder.
UNREAD_FORMATS = frozenset({"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG"})
# Endings of image files, those included for which Pillow has no reader.
IMAGE_SUFFIXES = frozenset(
    ".ai .arw .avif .avifs .cr2 .cr3 .djvu .dng .eps .exr .hdr .heic .heif .hif .jp2 .jxl .jxr .kra .nef "
    ".orf .pef .ps "
    ".psb .raf .raw .rw2 .sr2 .srw .svg .svgz .tif .tiff .wdp .webp .xcf".split()
)


class SortedFiles(NamedTuple):
    """File names by what can be done with them, each list in the order of the names given."""

    readable: list[str]
    no_reader: list[str]  # images of a format that Pillow cannot read here
    other: list[str]  # not images


def readable_formats() -> list[str]:
    """Names of the formats that `open_image` reads, in the order in which Pillow tries them."""
    Image.init()
    return [name for name in Image.ID if name not in UNREAD_FORMATS]


def readable_suffixes() -> frozenset[str]:
    """File name endings, such as ".jpg", of the formats that `open_image` reads; lower case."""
    formats = {*readable_formats(), "MPO"}  # MPO is registered for its name only; the JPEG reader reads it
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def sort_files(names: Iterable[str]) -> SortedFiles:
    """Sort file names by their endings; the files are not opened."""
    readable, found = readable_suffixes(), SortedFiles([], [], [])
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix in readable:
            found.readable.append(name)
        elif suffix in IMAGE_SUFFIXES:
            found.no_reader.append(name)
        else:
            found.other.append(name)
    return found


def no_reader_reason(name: str) -> str:
    """Why an image file of this name is left out."""
    return f"Pillow has no reader for {Path(name).suffix.lower()} files here"


def open_image(file: Path) -> Image.Image:
    """Open an image file as `PIL.Image.open` does, in the readable formats only. The content decides, not the name."""
    return Image.open(file, formats=readable_formats())
