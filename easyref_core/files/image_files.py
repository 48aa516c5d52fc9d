"""Image files: the formats that Pillow can read here, and opening a file.

The formats are Pillow's, with those of plugins in this process (HEIF, JPEG XL, ...), because the operating
system's table of file types differs from machine to machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

# Formats that are not read: EPS because Pillow starts Ghostscript for it, IPTC because it opens any format
# inside it (EPS included), the others because they hold films or tables, for which Pillow has no decoder.
UNREAD_FORMATS = frozenset({"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG"})
# Suffixes of image files, including those that Pillow cannot read.
IMAGE_SUFFIXES = frozenset(
    ".ai .arw .avif .avifs .cr2 .cr3 .djvu .dng .eps .exr .hdr .heic .heif .hif .jp2 .jxl .jxr .kra .nef "
    ".orf .pef .ps .psb .raf .raw .rw2 .sr2 .srw .svg .svgz .tif .tiff .wdp .webp .xcf".split()
)


class SortedFiles(NamedTuple):
    """File names by readability, in the order of the input."""

    readable: list[str]
    no_reader: list[str]  # images of a format that Pillow cannot read here
    other: list[str]  # not image files


def readable_formats() -> list[str]:
    """Names of the formats that `open_image` reads, in the order in which Pillow tries them."""
    Image.init()
    return [name for name in Image.ID if name not in UNREAD_FORMATS]


def readable_suffixes() -> frozenset[str]:
    """Suffixes of the formats that `open_image` reads, such as ".jpg", in lower case."""
    formats = {*readable_formats(), "MPO"}  # MPO is registered for its name only; the JPEG reader reads it
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def sort_files(names: Iterable[str]) -> SortedFiles:
    """Sort file names by their suffixes; the files are not opened."""
    readable, files = readable_suffixes(), SortedFiles([], [], [])
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix in readable:
            files.readable.append(name)
        elif suffix in IMAGE_SUFFIXES:
            files.no_reader.append(name)
        else:
            files.other.append(name)
    return files


def no_reader_reason(name: str) -> str:
    """The reason why an image file of this name is left out."""
    return f"Pillow has no reader for {Path(name).suffix.lower()} files here"


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Open an image file in a readable format, like `PIL.Image.open`. The content decides, not the name."""
    return Image.open(file, formats=readable_formats())
