"""The benchmark's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from devkit.cpu_torch import complete_cpu_torch
from tools.bench import __doc__ as about
from tools.bench.machine import describe
from tools.bench.report import markdown, write_json
from tools.bench.rows import Options

PARTS = {"encode": "encoding", "unet": "unet", "load": "loading"}  # part -> module
QUICK_PAIRS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen parts, print the table and write the JSON."""
    parsed = _parser().parse_args(arguments)
    options = Options(
        quick=parsed.quick,
        pairs=parsed.pairs or (QUICK_PAIRS if parsed.quick else Options.pairs),
        references=parsed.references,
        pixels=parsed.pixels,
        device=parsed.device,
    )
    machine, rows = describe(), []
    for part in parsed.parts:
        _say(f"{part}:")
        # not inference mode, in which what is counted on meta would show attention matrices
        with torch.no_grad():
            rows += import_module(f"tools.bench.{PARTS[part]}").measure(options, _say)
    _say(f"\n{markdown(machine, rows)}")
    if parsed.json:
        write_json(parsed.json, machine, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/bench",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", type=_parts, default=tuple(PARTS), help=f"of {','.join(PARTS)}; all if not given"
    )
    parser.add_argument("--json", type=Path, help="a file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="small shapes and few pairs: seconds in all")
    parser.add_argument(
        "--pairs", type=int, help=f"of each comparison ({Options.pairs}; {QUICK_PAIRS} if quick)"
    )
    parser.add_argument(
        "--references", type=_numbers, default=Options.references, help="group sizes to encode, as 1,3,6"
    )
    parser.add_argument(
        "--pixels", type=_numbers, default=Options.pixels, help="sides of the pictures timed, as 256,512"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}; choose of {', '.join(PARTS)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)  # noqa: T201


if __name__ == "__main__":
    complete_cpu_torch()
    sys.exit(main())
