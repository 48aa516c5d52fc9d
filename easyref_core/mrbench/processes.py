"""The processes that `accelerate launch` started; a single one without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

# Shares may finish far apart; accelerate's default of 10 minutes would end the run.
MAX_WAIT = timedelta(days=7)

Item = TypeVar("Item")


class Process(NamedTuple):
    """Rank and device of this process, and a barrier for all of them."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items; the shares of all processes are disjoint and cover all items."""
        return items[self.rank :: self.count]


def this_process() -> Process:
    """Return this process according to accelerate's launcher."""
    from accelerate import PartialState

    state = PartialState(timeout=MAX_WAIT)
    return Process(state.process_index, state.num_processes, str(state.device), state.wait_for_everyone)
