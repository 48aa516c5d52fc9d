"""The released checkpoint's full size, with random weights, through the loader node on this machine's CPU.

Writes a checkpoint of the released layout (tests/golden/released_layout.json, bfloat16, 5.9 GB) to a temporary folder,
loads it in ComfyUI, encodes two images, aggregates and projects them, and prints times and memory. About 6 GB of disk
and 8 GB of memory are needed. The memory of mapped files (which the system can take back) is told apart.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event, Thread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from devkit.cpu_torch import complete_cpu_torch
from devkit.host.in_process import enter_host, load_pack
from devkit.hosts import ROOT, find_hosts

LAYOUT = ROOT / "tests" / "golden" / "released_layout.json"
CHECKPOINT = "easyref.safetensors"
GIB = 2**30


def write_checkpoint(path: Path) -> int:
    """Random bfloat16 tensors of every key and shape of the released file; their bytes."""
    random = torch.Generator().manual_seed(0)
    shapes: dict[str, list[int]] = json.loads(LAYOUT.read_text(encoding="utf-8"))["keys"]
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1 and name.endswith("weight")  # norms
        else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=random)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return sum(tensor.nbytes for tensor in tensors.values())


def memory() -> dict[str, int]:
    """This process's resident memory in bytes: anonymous, and pages of mapped files (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print how long the block took and the most memory the process held meanwhile."""
    peak, done = memory(), Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    watcher, start = Thread(target=watch), time.monotonic()
    watcher.start()
    try:
        yield
    finally:
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
        print(
            f"{what}: {seconds:.1f} s, peak anonymous {peak['RssAnon'] / GIB:.2f} GiB, "
            f"mapped file pages {peak['RssFile'] / GIB:.2f} GiB",
            flush=True,
        )


def main() -> None:
    complete_cpu_torch()
    enter_host(find_hosts()[0])
    pack = load_pack()
    nodes = import_module(f"{pack.__name__}.nodes")
    instruction = import_module(f"{pack.__name__}.easyref_core").INSTRUCTION
    precision = sys.argv[1] if len(sys.argv) > 1 else "auto"
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        import folder_paths

        folder_paths.folder_names_and_paths["easyref"] = ([folder], {".safetensors"})
        print(f"checkpoint: {write_checkpoint(Path(folder) / CHECKPOINT) / GIB:.2f} GiB", flush=True)
        with measured("before loading"):
            gc.collect()
        with measured(f"load ({precision})"):
            source = "from the checkpoint"
            (easyref,) = nodes.EasyRefLoader.execute(CHECKPOINT, source, precision, source).result
        group = (torch.rand(1, 768, 1024, 3), torch.rand(1, 1024, 683, 3))
        with measured("encode 2 references"):
            (context,) = nodes.EasyRefEncodeGroup.execute(
                easyref, group, "an oil painting", instruction, 336
            ).result
        with measured("aggregate, both sides"):
            (tokens,) = nodes.EasyRefAggregate.execute(easyref, context).result
        with measured("K and V of 70 sites"):
            easyref.key_values(tokens)
        print(f"context {tuple(context.states.shape)}, tokens {tuple(tokens.conditional.shape)}")


if __name__ == "__main__":
    main()
