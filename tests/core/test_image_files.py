"""Image files: the formats that are read, which do not depend on the operating system."""

from __future__ import annotations

import mimetypes
import subprocess
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from easyref_core.files.image_files import open_image, readable_formats, readable_suffixes, sort_files


def test_files_are_sorted_by_what_pillow_reads() -> None:
    names = ["b.PNG", "a.jfif", "c.mpo", "d.jxl", "e.svg", "f.txt", "g", "h.mpg", "i.pdf", "j.eps", "k.h5"]
    files = sort_files(names)
    assert files.readable == ["b.PNG", "a.jfif", "c.mpo"]
    assert files.no_reader == ["d.jxl", "e.svg", "j.eps"]
    assert files.other == ["f.txt", "g", "h.mpg", "i.pdf", "k.h5"]


def test_readers_of_plugins_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ".new" not in readable_suffixes()
    monkeypatch.setattr(Image, "ID", [*Image.ID, "NEW"])
    monkeypatch.setitem(Image.EXTENSION, ".new", "NEW")
    assert ".new" in readable_suffixes()
    assert readable_formats()[-1] == "NEW"


def test_a_format_that_pillow_only_writes_is_not_read() -> None:
    assert not {".pdf", ".palm"} & readable_suffixes()


def test_the_system_s_table_of_file_types_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It differs between machines, and reading it opens files outside the host's folders."""
    monkeypatch.setattr(mimetypes, "guess_type", lambda *_, **__: pytest.fail("the system's table was used"))
    assert sort_files(["a.jfif", "b.heic", "c.new"]) == (["a.jfif"], ["b.heic"], ["c.new"])


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg", format="PNG")
    assert open_image(tmp_path / "a.jpg").format == "PNG"


def test_postscript_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for it."""
    for call in ("check_call", "Popen", "run"):
        monkeypatch.setattr(subprocess, call, lambda *_, **__: pytest.fail("a program was started"))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png", format="EPS")
    with pytest.raises(UnidentifiedImageError):
        open_image(tmp_path / "a.png")
