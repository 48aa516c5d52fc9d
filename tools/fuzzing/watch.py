"""What a case does beside its result: files it opens, processes and connections it starts, files it leaves behind."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = (  # audit events (PEP 578) of what the pack never does
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
)
SYSTEM = [  # where Python itself reads: imports, fonts, time zones
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    sys.prefix,
    sys.base_prefix,
    ROOT,
    "/proc",
    "/dev",
    "/sys",
    "/usr/lib",
    "/usr/share",
]

Files = dict[str, tuple[int, int]]


class Watch:
    """Told by the interpreter what is opened and started. One for a process: an audit hook cannot be taken off."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        self.forbidden: list[str] = []
        sys.addaudithook(self._hear)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.opened, self.forbidden = [], []
        try:
            yield
        finally:
            self._seen, self.opened = self.opened, None

    def outside(self, readable: Sequence[Path]) -> list[str]:
        """Files that were opened, links followed, neither in these folders nor where Python itself reads."""
        allowed = tuple(os.path.realpath(str(folder)) + os.sep for folder in [*readable, *SYSTEM])
        real = {os.path.realpath(path) for path in self._seen}
        return sorted(path for path in real if not (path + os.sep).startswith(allowed))

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.opened is None:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.append(os.fsdecode(arguments[0]))
        elif event in FORBIDDEN:
            self.forbidden.append(f"{event}{arguments!r}"[:200])


def files_of(folder: Path) -> Files:
    """{path: size and time of change} of everything in a folder; links are not followed."""
    found = {}
    for at, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(at, name)
            stat = os.lstat(path)
            is_plain = not os.path.isdir(path) or os.path.islink(path)
            found[path] = (stat.st_size, stat.st_mtime_ns) if is_plain else (0, 0)
    return found


def left_behind(before: Files, after: Files, writable: Sequence[Path]) -> list[str]:
    """What appeared outside `writable`, or changed or vanished anywhere."""
    allowed = tuple(f"{folder}{os.sep}" for folder in writable)
    new = [path for path in after.keys() - before.keys() if not (path + os.sep).startswith(allowed)]
    gone = [path for path in before if after.get(path) != before[path]]
    return sorted(new + gone)
