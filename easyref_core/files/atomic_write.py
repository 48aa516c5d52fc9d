"""Files that appear whole or not at all, whenever the process is killed or the disk is full."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """A name beside `path` to write to. It becomes `path` when the block ends, and is removed when the block raises.

    A killed process leaves .<digest of the name>.partial behind (shorter than a name may be, whatever path is): no list of
    ours shows it, and the next writing of `path` replaces it. Savers that tell the format by the suffix must be told it.
    """
    path = Path(path)
    partial = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
