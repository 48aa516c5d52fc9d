"""fast_hash: every kind of buffer, every hash that may be installed, and the values' kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from easyref_core.utils import fast_hash as module
from easyref_core.utils.fast_hash import HASHES, fast_hash

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture(params=[name for name, _ in HASHES])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the hashes, all that are slower than this one and this one."""
    pytest.importorskip(request.param)
    for name, _ in HASHES[: [name for name, _ in HASHES].index(request.param)]:
        monkeypatch.setitem(sys.modules, name, None)  # its import raises ImportError
    module.hasher.cache_clear()
    yield request.param
    module.hasher.cache_clear()


def test_hash_is_of_every_value_and_of_their_kind(installed: str) -> None:
    hashes = {fast_hash("a", VALUES), fast_hash("b", VALUES)}
    for index in np.ndindex(VALUES.shape):
        changed = VALUES.copy()
        changed[index] ^= 0x80
        hashes.add(fast_hash("a", changed))
    assert len(hashes) == 2 + VALUES.size
    assert fast_hash("a", VALUES.tobytes()) == fast_hash("a", VALUES) == fast_hash("a", VALUES.copy())
