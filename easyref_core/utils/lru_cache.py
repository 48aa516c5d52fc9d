"""A least-recently-used cache bounded by bytes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteLRUCache(Generic[Value]):
    """Values by key, at most `max_bytes` in all; the least recently used value is evicted first.

    A value larger than `max_bytes` is not stored. Iteration yields keys, least recently used first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._values: dict[Hashable, tuple[Value, int]] = {}  # in the order of their last use

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self._values.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Hashable]:
        return iter(tuple(self._values))

    def values(self) -> list[Value]:
        """All values, least recently used first; none of them counts as used."""
        return [value for value, _ in self._values.values()]

    def get(self, key: Hashable) -> Value:
        """Return a value, which becomes the most recently used. Raises KeyError for an absent key."""
        self._values[key] = self._values.pop(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        self.drop(key)
        if nbytes > self.max_bytes:
            return
        while self.nbytes + nbytes > self.max_bytes:
            self.drop(next(iter(self._values)))
        self._values[key] = value, nbytes

    def drop(self, key: Hashable) -> None:
        self._values.pop(key, None)

    def clear(self) -> None:
        self._values.clear()
