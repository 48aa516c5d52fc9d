"""What was computed before and may be wanted again: the latest of it, up to a number of bytes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteLRUCache(Generic[Value]):
    """Values by key, at most `limit` bytes of them; the one that was not asked for the longest goes first.

    What is larger than the limit by itself is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: dict[Hashable, tuple[Value, int]] = {}  # in the order of their last use

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self._values.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Hashable]:
        return iter(tuple(self._values))

    def get(self, key: Hashable) -> Value:
        """The value of a key that is kept; it is now the one last used."""
        self._values[key] = self._values.pop(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        self.drop(key)
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self.drop(next(iter(self._values)))
        self._values[key] = value, nbytes

    def drop(self, key: Hashable) -> None:
        self._values.pop(key, None)

    def clear(self) -> None:
        self._values.clear()
