"""Runs cases of one kind: `python -m tools.fuzzing.worker KIND SEED FIRST END`, one JSON line each on the output.

Before a case its number is printed, so that the one that brought the process down is known.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import Skipped, open_kind, seeded

if TYPE_CHECKING:
    from .cases import Kind

GOOD_EVERY = 25  # cases, and at the end
MEMORY = int(2.5 * 2**30)  # bytes of address space that a case may add to what the process has


def main() -> None:
    kind, seed, first, end = sys.argv[1], *map(int, sys.argv[2:5])
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the code under test prints is not ours
    try:
        for line in reports(kind, seed, first, end):
            print(json.dumps(line), file=lines, flush=True)
    except Skipped as skipped:
        print(json.dumps({"skipped": str(skipped)}), file=lines, flush=True)


def reports(kind: str, seed: int, first: int, end: int) -> Iterator[dict[str, Any]]:
    """{"ready": True}, then for each case {"start": number} and {"case": number, "how": ..., "text": ..., "about": ...}."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="easyref_fuzz_")))
    try:
        yield from run(open_kind(kind, folder), folder, kind, seed, range(first, end))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(cases: Kind, folder: Path, kind: str, seed: int, numbers: range) -> Iterator[dict[str, Any]]:
    """The lines of `reports` for an opened kind."""
    import torch

    from .judge import FAILURE, digest, judged
    from .watch import Watch, files_of, left_behind

    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    watch, good = Watch(), digest(cases.good())
    own = folder / "case"
    limit_memory()
    yield {"ready": True}
    for number in numbers:
        yield {"start": number}
        own.mkdir()
        case = cases.make(seeded(kind, seed, number), own)
        before = files_of(folder)
        with watch.watching():
            outcome = judged(case.call)
        after = files_of(folder)
        how, text = outcome
        if left := left_behind(before, after, cases.writable):
            how, text = FAILURE, f"files were left behind or changed: {', '.join(left)[:300]}"
        elif watch.forbidden:
            how, text = FAILURE, f"what the pack never does was done: {', '.join(watch.forbidden)[:300]}"
        elif cases.readable is not None and (read := watch.outside([*cases.readable, own])):
            how, text = FAILURE, f"files outside the folders were opened: {', '.join(read)[:300]}"
        clear(own, after.keys() - before.keys())
        if (number + 1) % GOOD_EVERY == 0 or number + 1 == numbers.stop:
            if (now := good_again(cases)) != good:
                how, text = FAILURE, f"the good input gives something else since one of the last cases: {now}"
        yield {"case": number, "how": how, "text": text, "about": case.about[:500]}


def good_again(cases: Kind) -> str:
    from .judge import digest

    try:
        return digest(cases.good())
    except Exception:
        return traceback.format_exc()[-400:]


def clear(own: Path, new: set[str]) -> None:
    """Remove a case's own files and what it made."""
    shutil.rmtree(own)
    for path in sorted(new, reverse=True):
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        elif os.path.lexists(path):
            os.remove(path)


def limit_memory() -> None:
    """Let the process ask for no more than MEMORY beside what it has, where the system can (Linux)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    except (ImportError, OSError):
        return
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
