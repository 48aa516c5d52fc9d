"""A property over drawn cases of bad input: each ends right or in one clear error, and does nothing else.

By default a few derandomized cases; tools/fuzz.py asks for many from a seed, in environment variables.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

from devkit.bad_input import watch
from devkit.bad_input.judge import digest, judge, message_key

CASES, SEED, REPORT = "EASYREF_FUZZ_CASES", "EASYREF_FUZZ_SEED", "EASYREF_FUZZ_REPORT"

Prepare = Callable[[Any, Path], Callable[[], object]]


class Campaign:
    """Runs cases in a folder.

    Args:
        folder: the cases' own; its files must stay as they are.
        readable: folders in which a case may open files; None allows all.
        writable: folders in which a case may leave new files.
        max_seconds: time that one case may take.
    """

    def __init__(
        self,
        folder: Path,
        readable: Sequence[Path] | None = None,
        writable: Sequence[Path] = (),
        max_seconds: float = 30,
    ) -> None:
        self.folder, self.readable, self.writable = folder, readable, writable
        self.max_seconds = max_seconds
        self.errors: list[str] = []
        self.cases = 0
        self._report = open(os.environ[REPORT], "w+", encoding="utf-8") if REPORT in os.environ else None

    def run(self, cases: SearchStrategy, prepare: Prepare, good: Callable[[], object], count: int) -> None:
        """Hold drawn cases to the property; `good()` must give the same bytes before and after them.

        prepare: writes a case's files into an empty folder, and returns the call to judge.
        count: cases, unless the environment sets another number.
        """
        drawn = os.environ.get(CASES)

        def property_of(case: Any) -> None:
            self.check(case, prepare)

        test = given(cases)(property_of)
        if drawn:
            test = seed(int(os.environ[SEED]))(test)
        before = digest(good())
        settings(
            max_examples=int(drawn or count),
            derandomize=not drawn,
            report_multiple_bugs=bool(drawn),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(test)()
        assert digest(good()) == before, "a good input gives something else after these cases"
        self._note(
            cases=self.cases, errors=len(self.errors), distinct=len(set(map(message_key, self.errors)))
        )

    def check(self, case: Any, prepare: Prepare) -> None:
        """Judge one case; raises AssertionError if it fails."""
        self._note(case=repr(case)[:500])
        start, own = watch.files_of(self.folder), self.folder / "case"
        own.mkdir()
        try:
            error = self._judge(prepare(case, own), own)
        finally:
            for path in sorted(watch.files_of(self.folder).keys() - start.keys(), reverse=True):
                os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
        self.cases += 1
        self.errors += [error] if error else []

    def _judge(self, call: Callable[[], object], own: Path) -> str:
        before, observed = watch.files_of(self.folder), watch.process_watch()
        limits = watch.memory_limit(), watch.time_limit(self.max_seconds, self._report)
        try:
            with warnings.catch_warnings(), limits[0], limits[1], observed.active():
                warnings.simplefilter("ignore")  # torch and PIL warn about some damaged files
                error = judge(call)
        except watch.Hang:
            raise AssertionError(f"no answer within {self.max_seconds} seconds") from None
        left = watch.left_behind(before, watch.files_of(self.folder), self.writable)
        assert not left, f"files were left behind or changed: {', '.join(left)[:300]}"
        assert not observed.forbidden, f"the pack never does this: {', '.join(observed.forbidden)[:300]}"
        if self.readable is not None:
            outside = observed.opened_outside([*self.readable, own])
            assert not outside, f"files outside the folders were opened: {', '.join(outside)[:300]}"
        return error

    def _note(self, **fields: object) -> None:
        """Write the last case or the counts to the report, which outlives a process that a case ends."""
        if self._report:
            self._report.seek(0)
            self._report.truncate()
            json.dump(fields, self._report)
            self._report.flush()
