"""Bad input by the thousand: `python tools/fuzz.py [--only KIND] [--cases N] [--seed S]`.

Runs the property tests of tests/core/test_fuzz.py and tests/host/test_fuzz.py on more cases, each kind in a
process of its own, because it may crash or hang. Prints a table; the exit status is 1 if a kind failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

from devkit.bad_input.campaign import CASES, REPORT, SEED
from devkit.hosts import ROOT

DEFAULT_CASES = 18_000
PERCENT = {  # of the cases
    "core": {"checkpoint": 25, "mllm_folder": 15, "token_files": 20, "images": 6, "text": 6},
    "host": {"numerics": 14, "paths": 14},
}
KINDS = {kind: room for room, kinds in PERCENT.items() for kind in kinds}
RESULTS = {0: "passed", 1: "failed", 5: "skipped"}  # by pytest's exit status


class Ended(NamedTuple):
    """The end of a kind: its result, and its counts or the case it ended at."""

    result: str
    report: dict[str, Any]


def run_kind(test: str, cases: int, seed: int) -> Ended:
    """Run one property test, by pytest's name of it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        numbers = {CASES: str(cases), SEED: str(seed), REPORT: str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", test]
        process = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **numbers})
        lines = report.read_text(encoding="utf-8", errors="replace") if report.exists() else ""
    try:
        fields, _ = json.JSONDecoder().raw_decode(lines)
    except ValueError:
        fields = {}
    result = RESULTS.get(process.returncode, "crashed")
    return Ended("skipped" if result == "passed" and not fields else result, fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", type=int, default=DEFAULT_CASES, help="of all kinds, or of the one (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args()
    start = time.monotonic()
    rows = ["| kind | cases | right results | clear errors | distinct errors | result |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | --- |")
    results = set()
    for kind in [arguments.only] if arguments.only else KINDS:
        room = KINDS[kind]
        cases = arguments.cases if arguments.only else arguments.cases * PERCENT[room][kind] // 100
        print(f"\n{kind}, {cases} cases", flush=True)
        ended = run_kind(f"tests/{room}/test_fuzz.py::test_{kind}", cases, arguments.seed)
        results.add(ended.result)
        if "case" in ended.report:
            print(f"{ended.result}; the last case: {ended.report['case']}")
        total, errors = ended.report.get("cases", 0), ended.report.get("errors", 0)
        counts = [total, total - errors, errors, ended.report.get("distinct", 0)]
        rows.append(f"| {kind.replace('_', ' ')} | {' | '.join(f'{n:,}' for n in counts)} | {ended.result} |")
    print(f"\nseed {arguments.seed}, {time.monotonic() - start:.0f} s\n")
    print("\n".join(rows))
    sys.exit(bool(results & {"failed", "crashed"}))


if __name__ == "__main__":
    main()
