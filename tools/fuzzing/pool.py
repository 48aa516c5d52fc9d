"""Workers, started and started again: a case that hangs or brings its process down is a failure, and the run goes on."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT, CASE_LIMIT = 180, 30  # seconds until a worker is ready, and for one case


class Failed(NamedTuple):
    """A case that failed: what the input was, and why it is a failure."""

    number: int
    about: str
    why: str


class Tally:
    """What came of the cases of one kind."""

    def __init__(self) -> None:
        self.skipped = ""
        self.counts: Counter[str] = Counter()  # by judge.Outcome.how
        self.messages: Counter[str] = Counter()
        self.failures: list[Failed] = []

    @property
    def cases(self) -> int:
        return sum(self.counts.values())

    def add(self, line: dict[str, Any]) -> None:
        from .judge import ERROR, FAILURE, same_message

        self.counts[line["how"]] += 1
        if line["how"] == ERROR:
            self.messages[same_message(line["text"])] += 1
        if line["how"] == FAILURE:
            self.failures.append(Failed(line["case"], line["about"], line["text"]))


def run_kind(
    kind: str, seed: int, first: int, end: int, told: Callable[[Tally], None] = lambda _: None
) -> Tally:
    """Run cases first..end-1 of a kind. told: called after each."""
    tally = Tally()
    while first < end and not tally.skipped:
        first = _run_worker(kind, seed, first, end, tally, told)
    return tally


def _run_worker(
    kind: str, seed: int, first: int, end: int, tally: Tally, told: Callable[[Tally], None]
) -> int:
    """One process, until it is done or has to be ended; the number of the next case."""
    command = [sys.executable, "-m", "tools.fuzzing.worker", kind, str(seed), str(first), str(end)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str] = queue.Queue()
    last: list[str] = []  # of what it wrote as errors
    readers = [
        Thread(target=_pass_on, args=(process.stdout, lines.put), daemon=True),
        Thread(
            target=_pass_on,
            args=(process.stderr, lambda line: last.__setitem__(slice(None), [*last[-5:], line])),
        ),
    ]
    for reader in readers:
        reader.start()
    running, next_case, why = None, first, ""
    try:
        while True:
            line = lines.get(timeout=CASE_LIMIT if next_case > first or running is not None else START_LIMIT)
            if not line:
                break
            report = json.loads(line)
            running = report.get("start", running)
            if "skipped" in report:
                tally.skipped = report["skipped"]
            if "case" in report:
                tally.add(report)
                told(tally)
                running, next_case = None, report["case"] + 1
    except queue.Empty:
        why = f"no answer within {CASE_LIMIT} seconds"
    process.kill()
    code = process.wait()
    if tally.skipped or next_case == end:
        return next_case
    if running is None and next_case == first:
        raise RuntimeError(f"The worker for {kind} did not start: {''.join(last)}")
    number = next_case if running is None else running
    why = why or f"the process ended with code {code}: {''.join(last)[-300:]}"
    tally.add({"case": number, "how": "failure", "text": why, "about": "(run it alone to see it)"})
    told(tally)
    return number + 1


def _pass_on(stream: Any, take: Callable[[str], object]) -> None:
    for line in stream:
        take(line)
    take("")
