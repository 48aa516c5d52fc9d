"""The released checkpoint's full size, with random weights, in the loader node on this machine's CPU.

    python tools/full_size.py [PRECISION]

Writes a checkpoint of the released layout (tests/golden/released_layout.json, bfloat16, 5.9 GB) to a
temporary folder, loads it in ComfyUI, encodes two images, aggregates and projects them, and prints times and
memory. About 6 GB of disk and 8 GB of memory are needed. The memory of mapped files, which the system can
take back, is listed separately.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import find_hosts
from tools.bench.random_weights import write_released
from tools.bench.report import GIB
from tools.bench.timing import PeakMemory

CHECKPOINT, SOURCE = "easyref.safetensors", "from the checkpoint"


def measure(name: str, call: Callable[[], Any]) -> Any:
    """Result of a call; prints its time and the most memory that the process held meanwhile."""
    start = time.monotonic()
    with PeakMemory() as peak:
        result = call()
    seconds = time.monotonic() - start
    anonymous, mapped = (f"{size / GIB:.2f} GiB" for size in (peak.anonymous, peak.mapped))
    print(f"{name}: {seconds:.1f} s, peak anonymous {anonymous}, mapped file pages {mapped}", flush=True)
    return result


def main() -> None:
    complete_cpu_torch()
    enter_host(find_hosts()[0])
    pack = load_pack()
    nodes = import_module(f"{pack.__name__}.nodes")
    instruction = import_module(f"{pack.__name__}.easyref_core").INSTRUCTION
    precision = sys.argv[1] if len(sys.argv) > 1 else "auto"
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        import folder_paths

        def run(name: str, node: str, *inputs: Any) -> Any:
            return measure(name, lambda: getattr(nodes, node).execute(*inputs).result[0])

        import_module(f"{pack.__name__}.nodes.host.folders").register_folders()
        folder_paths.folder_names_and_paths["easyref"] = ([folder], {".safetensors"})
        print(f"checkpoint: {write_released(Path(folder) / CHECKPOINT) / GIB:.2f} GiB", flush=True)
        measure("before loading", lambda: None)
        easyref = run(f"load ({precision})", "EasyRefLoader", CHECKPOINT, SOURCE, precision, SOURCE)
        group = (torch.rand(1, 768, 1024, 3), torch.rand(1, 1024, 683, 3))
        texts = "an oil painting", instruction, 336
        context = run("encode 2 references", "EasyRefEncodeGroup", easyref, group, *texts)
        tokens = run("aggregate, both sides", "EasyRefAggregate", context)
        measure("K and V of 70 sites", lambda: easyref.key_values(tokens))
        print(f"context {tuple(context.states.shape)}, tokens {tuple(tokens.conditional.shape)}")


if __name__ == "__main__":
    main()
