"""Atomic writes: write to a hidden temporary file beside the target, then `os.replace`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path. It replaces `path` when the block ends, and is removed when the block raises.

    A killed process leaves the temporary file behind. Its leading dot hides it from lists of files, and the
    next write of `path` replaces it. It is named by a digest, because `path` may have the longest name that
    the system allows. Its suffix is .partial, so savers that choose the format by the suffix need it as an
    argument.
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
