"""Fingerprints of the files that a node reads, whether their names are typed or linked."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from comfy_execution.utils import get_executing_context

MAX_RECORDS = 256
PROCESS = uuid.uuid4().hex  # a cache that outlives this process must not match the counters of another one


class FileChanges:
    """Fingerprints that change when files that a node read are replaced, added or removed.

    The host computes fingerprints before it runs a graph, and passes None for every linked input. The files
    behind linked values are known only while the node runs. `record` therefore stores their state, and a
    later `fingerprint` compares it with the present files: its result changes if one of them changed, or if a
    record was dropped because there were more than MAX_RECORDS.

    Records are shared by all nodes of one class, because the host's cache does not distinguish nodes with
    equal inputs.
    """

    def __init__(self, state: Callable[..., str]) -> None:
        """state: describes the files that the node reads for its input values, for example by size and time.

        Where it raises OSError or ValueError, the message is the state.
        """
        self._state = state
        self._records: dict[tuple[Any, ...], str] = {}
        self._changes = 0
        self._linked: set[tuple[str, str] | None] = set()  # nodes of the current prompt with linked values

    def fingerprint(self, *values: Any) -> str:
        """The fingerprint for these input values; None for a value that comes through a link."""
        if None not in values:
            return self._state_of(values)
        node = _executing()
        self._linked = {other for other in self._linked if other and node and other[0] == node[0]} | {node}
        for read, state in list(self._records.items()):
            if self._state_of(read) != state:
                self._forget(read)
        return f"{PROCESS} {self._changes}"

    def record(self, *values: Any) -> None:
        """Store the state of the files for these values. Call it in `execute`, before the files are read."""
        if _executing() not in self._linked:
            return
        state = self._state_of(values)
        if self._records.get(values, state) != state:  # an earlier node of this prompt read the old files
            self._forget(values)
        self._records[values] = state
        if len(self._records) > MAX_RECORDS:
            self._forget(next(iter(self._records)))

    def _state_of(self, values: tuple[Any, ...]) -> str:
        try:
            return self._state(*values)
        except (OSError, ValueError) as error:
            return str(error)

    def _forget(self, values: tuple[Any, ...]) -> None:
        del self._records[values]
        self._changes += 1


def _executing() -> tuple[str, str] | None:
    """Prompt and node that the host is executing or fingerprinting; None if the node is called directly."""
    context = get_executing_context()
    return context and (context.prompt_id, context.node_id)
