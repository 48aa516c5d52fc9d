"""Command line of the benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from devkit.cpu_torch import complete_cpu_torch
from tools.bench import __doc__ as about
from tools.bench.report import Options, describe, numbers, parser, publish

PARTS = {  # part -> module
    "encode": "encoding",
    "stages": "stages",
    "unet": "unet",
    "load": "loading",
    "import": "importing",
}
QUICK_PAIRS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen parts, print the table and write the JSON."""
    commands = parser(about)
    commands.prog = "python tools/bench"
    commands.add_argument("--parts", default=",".join(PARTS), help="%(default)s if not given")
    commands.add_argument(
        "--quick", action="store_true", help=f"small shapes, {QUICK_PAIRS} pairs: seconds in all"
    )
    groups = "group sizes to encode, as 1,3,6"
    commands.add_argument("--references", type=numbers, default=Options.references, help=groups)
    commands.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    fields = vars(commands.parse_args(arguments))
    parts, file = fields.pop("parts").split(","), fields.pop("json")
    for name in set(parts) - set(PARTS):
        commands.error(f"unknown part {name!r}; choose from {', '.join(PARTS)}")
    fields["pairs"] = fields["pairs"] or (QUICK_PAIRS if fields["quick"] else Options.pairs)
    options, machine, rows, say = Options(**fields), describe(), [], partial(print, flush=True)
    for part in parts:
        say(f"{part}:")
        # not inference mode, in which counting on meta tensors would show attention matrices
        with torch.no_grad():
            rows += import_module(f"tools.bench.{PARTS[part]}").measure(options, say)
    publish(machine, rows, file)
    return 0


if __name__ == "__main__":
    complete_cpu_torch()
    sys.exit(main())
