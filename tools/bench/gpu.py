"""EasyRef's speed, memory and accuracy on a GPU, in one run of less than 8 minutes and without network.

    python tools/bench/gpu.py [--comfyui FOLDER] [--report gpu.md] [--json gpu.json]

Writes a Markdown report and JSON. Each part runs in a process of its own, so that an error, or the end of its
time, leaves the others (gpu_parts). The models have random weights, made here, in the released layout: about
12 GB of disk in the temporary folder, 14 GB of memory and 24 GB on the device. Needed: a build of torch for
the device, and einops, numpy, pillow, psutil, pyyaml, safetensors and tokenizers; transformers and diffusers
for the parts that compare with them; ComfyUI's own requirements with --comfyui. Without a GPU, everything
runs at small sizes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from devkit.cpu_torch import complete_cpu_torch
from tools.bench.gpu_parts.report import as_json, markdown
from tools.bench.gpu_parts.runner import PARTS, options_of, run_part, run_parts
from tools.bench.report import describe, numbers

TOTAL_SECONDS = 450.0  # of all parts; less than 8 minutes with what is around them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts and write the report, or one part for the process that started this one."""
    fields = vars(parser().parse_args(arguments))
    chosen, say = fields["part"] or list(PARTS), partial(print, flush=True)
    if fields["folder"]:
        run_part(chosen[0], options_of(fields), say)
        return 0
    with tempfile.TemporaryDirectory(prefix="easyref-", ignore_cleanup_errors=True) as folder:
        options = options_of(fields | {"folder": Path(folder)})
        machine = describe()
        outcomes = run_parts(chosen, options, fields["seconds"], say)
    report = markdown(machine, outcomes, options)
    fields["report"].write_text(report, encoding="utf-8")
    fields["json"].write_text(as_json(machine, outcomes, options), encoding="utf-8")
    print(f"\n{report}\nwritten: {fields['report']}, {fields['json']}", flush=True)
    return int(any(outcome.problem.startswith("Failed") for outcome in outcomes))


def parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    commands = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    commands.add_argument("--comfyui", type=lambda text: Path(text).resolve(), help="folder of a ComfyUI")
    commands.add_argument("--report", type=Path, default=Path("gpu.md"), help="%(default)s if not given")
    commands.add_argument("--json", type=Path, default=Path("gpu.json"), help="%(default)s if not given")
    seconds = "that all parts may take together (%(default)s)"
    commands.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help=seconds)
    part = "a part to measure, of all; may be repeated: " + "; ".join(PARTS)
    commands.add_argument("--part", action="append", choices=list(PARTS), metavar="NAME", help=part)
    commands.add_argument("--quick", action="store_true", help="small sizes, as always on a CPU")
    commands.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands.add_argument("--pairs", type=int, help="of each comparison")
    commands.add_argument("--references", type=numbers, help="group sizes to encode, as 1,4,8")
    folder = (
        "measure one part in this process, and store its rows in this folder (used by the command itself)"
    )
    commands.add_argument("--folder", type=Path, help=folder)
    return commands


if __name__ == "__main__":
    complete_cpu_torch()
    sys.exit(main())
