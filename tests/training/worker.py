"""A process of its own, for tests that kill it or need two: python worker.py <what> <base> <output> [...]."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from devkit.cpu_torch import complete_cpu_torch
from easyref_core.training import run as run_module
from easyref_core.training.batches import loader
from easyref_core.training.initial import Weights
from easyref_core.training.loop import train
from easyref_core.training.run import Run
from tests.training import tiny


def die(base: Path, output: Path, last: str) -> None:
    """Train until a position beyond `last` is asked for; the process is killed then."""
    train(tiny.resumable(base, output), tiny.DyingExamples(tiny.config(), int(last)))


def gradients(base: Path, output: Path, batch_size: str) -> None:
    """Write the gradients of one update before the optimizer takes them, as every process has them."""
    _compute_in_float64()
    settings = tiny.settings(base, output, **tiny.GOLDEN_START, batch_size=int(batch_size), accumulation=2)
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=plugin)
    run = Run(settings, accelerator, tiny.TinyExamples(tiny.config()))
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = loader(run.examples, 0, 1, settings.batch_size, 2, rank, world)
    for _ in range(2):
        with accelerator.accumulate(run.prepared):
            accelerator.backward(run.loss(next(batches)))
    torch.save(
        {name: parameter.grad for name, parameter in run.model.named_parameters()},
        output / f"gradients-{rank}-of-{world}.pt",
    )


def _compute_in_float64() -> None:
    """Less of the rounding, which this tiny UNet's norms enlarge; the rotary embedding stays float32."""
    run_module.MIXED["no"] = torch.float64
    load = run_module.load_weights

    def doubled(*arguments: Any) -> Weights:
        weights = load(*arguments)
        return dataclasses.replace(weights, tensors={name: t.double() for name, t in weights.tensors.items()})

    run_module.load_weights = doubled


if __name__ == "__main__":
    complete_cpu_torch()  # before diffusers and transformers are imported
    torch.set_num_threads(1)
    what, base, output, *rest = sys.argv[1:]
    {"die": die, "gradients": gradients}[what](Path(base), Path(output), *rest)
