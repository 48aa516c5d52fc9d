"""Bad input by the thousand: `python tools/fuzz.py [--cases N] [--seed S] [--only KIND] [--case I]`.

Feeds broken and odd files, images, texts, numbers and paths to the real code. Each must give a right result or one
clear error of our own, in time, with nothing left behind. Prints a table; the exit status is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# last: this pack's `nodes` must not hide ComfyUI's nodes.py
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.fuzzing.cases import KINDS
from tools.fuzzing.judge import ERROR, FAILURE, RIGHT
from tools.fuzzing.pool import Tally, run_kind

CASES = 18_000  # in five to ten minutes on one core
SHARE = {  # of the cases, in hundredths
    "checkpoint": 25,
    "mllm_folder": 15,
    "token_files": 20,
    "images": 6,
    "text": 6,
    "numerics": 14,
    "paths": 14,
}
SHOWN = 20  # failures of a kind that are printed


def main() -> None:
    arguments = parse()
    tallies, start = {}, time.monotonic()
    for kind in [arguments.only] if arguments.only else KINDS:
        count = arguments.cases if arguments.only else arguments.cases * SHARE[kind] // 100
        first = 0 if arguments.case is None else arguments.case
        end = count if arguments.case is None else first + 1
        tallies[kind] = run_kind(kind, arguments.seed, first, end, progress(kind, end - first))
        show_failures(kind, arguments.seed, tallies[kind])
    print(f"\nseed {arguments.seed}, {time.monotonic() - start:.0f} s\n\n{table(tallies)}")
    sys.exit(any(tally.failures for tally in tallies.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=CASES, help=f"of all kinds, or of the one ({CASES})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--case", type=int, help="one case of a kind, by its number")
    arguments = parser.parse_args()
    if arguments.case is not None and not arguments.only:
        parser.error("--case needs --only: cases are numbered within their kind")
    return arguments


def progress(kind: str, of: int):
    """Prints how far a kind is, on a terminal."""
    if not os.isatty(2):
        return lambda _: None
    return lambda tally: print(
        f"\r{kind}: {tally.cases} of {of}, {len(tally.failures)} failed ", end="", file=sys.stderr
    )


def show_failures(kind: str, seed: int, tally: Tally) -> None:
    for failed in tally.failures[:SHOWN]:
        print(f"\n{kind} {failed.number}: {failed.about}\n  {failed.why}")
        print(f"  again: .venv/bin/python tools/fuzz.py --only {kind} --seed {seed} --case {failed.number}")
    if len(tally.failures) > SHOWN:
        print(f"\n{kind}: {len(tally.failures) - SHOWN} more failures")


def table(tallies: dict[str, Tally]) -> str:
    """The counts of each kind and of all, as a Markdown table."""
    lines = [
        "| kind | cases | right results | clear errors | distinct errors | failures |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, tally in tallies.items():
        name = kind.replace("_", " ")
        if tally.skipped:
            lines.append(f"| {name} | skipped: {tally.skipped} | | | | |")
            continue
        counts = [
            tally.cases,
            tally.counts[RIGHT],
            tally.counts[ERROR],
            len(tally.messages),
            len(tally.failures),
        ]
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |")
    total = [sum(t.counts[how] for t in tallies.values()) for how in (RIGHT, ERROR, FAILURE)]
    messages = len({message for tally in tallies.values() for message in tally.messages})
    lines.append(f"| **all** | {sum(total):,} | {total[0]:,} | {total[1]:,} | {messages:,} | {total[2]:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
