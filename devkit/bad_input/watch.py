"""A watch over one call: files it opens or leaves behind, processes and connections, time and memory."""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from devkit.hosts import ROOT

FORBIDDEN = set(  # audit events (PEP 578) that the pack never causes
    "socket.connect socket.getaddrinfo subprocess.Popen os.system os.exec os.posix_spawn "
    "pickle.find_class".split()
)
SYSTEM = [  # folders that Python itself reads: imports, fonts, time zones
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    *(sys.prefix, sys.base_prefix, ROOT, "/proc", "/dev", "/sys", "/usr/lib", "/usr/share"),
]
MAX_BYTES = int(2.5 * 2**30)  # address space beyond that of the process before the call

Files = dict[str, tuple[int, int]]


class Hang(BaseException):
    """Raised in a call that takes too long; not an Exception, so that the call cannot catch it."""


class Watch:
    """Records audit events while it is active. One for a process, because an audit hook cannot be removed."""

    def __init__(self) -> None:
        self.opened: set[str] = set()
        self.forbidden: list[str] = []
        self._active = False
        sys.addaudithook(self._record)

    @contextmanager
    def active(self) -> Iterator[None]:
        self.opened.clear()
        self.forbidden.clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def opened_outside(self, readable: Sequence[Path]) -> list[str]:
        """Opened files, links followed, that are neither in these folders nor where Python itself reads."""
        allowed = tuple(os.path.realpath(str(folder)) + os.sep for folder in [*readable, *SYSTEM])
        paths = {os.path.realpath(path) for path in self.opened}
        return sorted(path for path in paths if not (path + os.sep).startswith(allowed))

    def _record(self, event: str, arguments: tuple) -> None:
        if not self._active:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.add(os.fsdecode(arguments[0]))
        elif event in FORBIDDEN:
            self.forbidden.append(f"{event}{arguments!r}"[:200])


process_watch = functools.cache(Watch)


@contextmanager
def time_limit(seconds: float, log: IO | None = None) -> Iterator[None]:
    """Raise Hang in the block after `seconds`. With a log, also end a process that hangs in native code."""
    if log is not None:
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=log)
    if hasattr(signal, "SIGALRM"):
        previous = signal.signal(signal.SIGALRM, _raise_hang)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        if log is not None:
            faulthandler.cancel_dump_traceback_later()


def _raise_hang(*_: object) -> None:
    raise Hang


@contextmanager
def memory_limit(size: int = MAX_BYTES) -> Iterator[None]:
    """Let the process take at most `size` bytes of address space more in the block (Linux)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def files_of(folder: Path) -> Files:
    """{path: size and time of change} of everything in a folder; links are not followed."""
    files = {}
    for root, folders, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in [*folders, *names]):
            stat = os.lstat(path)
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            files[path] = (0, 0) if is_folder else (stat.st_size, stat.st_mtime_ns)
    return files


def left_behind(before: Files, after: Files, writable: Sequence[Path] = ()) -> list[str]:
    """Paths that appeared outside `writable`, or changed or vanished anywhere."""
    allowed = tuple(f"{folder}{os.sep}" for folder in writable)
    new = [path for path in after.keys() - before.keys() if not (path + os.sep).startswith(allowed)]
    return sorted([*new, *(path for path in before if after.get(path) != before[path])])
