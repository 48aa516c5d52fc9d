"""fast_hash(): the fastest hash that is installed, for values that are compared within one process."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Module and class, the fastest first: xxhash is optional, ComfyUI brings blake3, Python has SHA-256. Images
# of 100 MB took 4, 38 and 73 ms of one CPU core. XXH3's 128 bits do not resist crafted collisions; one would
# only mix up two images of whoever crafted them.
HASHES = (("xxhash", "xxh3_128"), ("blake3", "blake3"), ("hashlib", "sha256"))


def fast_hash(kind: str, values: Any) -> bytes:
    """Hash of a contiguous buffer. kind: shape and type of its values, which are hashed too.

    It may differ from one machine to another, so it must not be stored in a file.
    """
    content = hasher()(kind.encode())
    content.update(memoryview(values).cast("B"))
    return content.digest()


@cache
def hasher() -> Callable[[bytes], Any]:
    """Class of the fastest hash that is installed."""
    for module, name in HASHES:
        try:
            return getattr(import_module(module), name)
        except ImportError:
            continue
    raise AssertionError("hashlib is part of Python")
