"""Time of importing the core in a fresh process, in pairs with importing torch alone."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from devkit.hosts import ROOT
from tools.bench.report import Limit, Options, Row
from tools.bench.timing import Say, interleaved

WANTED = Limit("<=", 1.1)


def measure(options: Options, say: Say) -> list[Row]:
    """Seconds of a process that imports torch and the core, to one that imports torch."""
    say("  import torch, import torch and the core")
    ways = (partial(run, f"import {modules}") for modules in ("torch", "torch, easyref_core"))
    pairs = interleaved(*ways, options.pairs, say)
    return [pairs.row("import torch and the core; to torch alone", WANTED)]


def run(code: str) -> None:
    """Run Python code in a fresh process. Raises subprocess.CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
