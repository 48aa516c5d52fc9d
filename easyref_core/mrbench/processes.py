"""This process among those that `accelerate launch` started; alone without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

# shares of the work may end far apart; the default, 10 minutes, would end the run
LONGEST_WAIT = timedelta(days=7)

Item = TypeVar("Item")


class Process(NamedTuple):
    """Which process this is, what it computes on, and how it waits for the others."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part; the parts of all are all items, each once."""
        return items[self.rank :: self.count]


def this_process() -> Process:
    """What accelerate's launcher says of this process."""
    from accelerate import PartialState

    state = PartialState(timeout=LONGEST_WAIT)
    return Process(state.process_index, state.num_processes, str(state.device), state.wait_for_everyone)
