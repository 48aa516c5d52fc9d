"""Signals that end a run after its current update: SIGTERM, which schedulers send before they kill."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

# SIGUSR1 is what `sbatch --signal` is often told to send; Windows does not have it.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(Exception):
    """A signal ended the run, whose state is saved."""


@contextmanager
def stop_trigger(accelerator: Accelerator) -> Iterator[None]:
    """Set the accelerator's trigger when a signal of STOPPING arrives, while the context is open.

    `accelerator.check_trigger()` is then True in every process, at the same update. Further signals change
    nothing, because a scheduler and a launcher may both send one. Signals can only be handled in the main
    thread; elsewhere they keep their usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        log.warning("%s: the run stops after this update.", signal.Signals(number).name)
        accelerator.set_trigger()

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stop(_: int) -> None:
    """Ignore the signals in a data loading process, because they are sent to it too.

    It ends with the process that it loads for, which needs its batches until the update is done.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
