"""Subprocess of tests that kill it or need two: python worker.py <base> (<command> <output> <argument>) ...

Starting one takes longer than most commands, so tests run several of them in turn.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import DistributedType, PartialState

from devkit.cpu_torch import complete_cpu_torch
from easyref_core.training import loop
from easyref_core.training import run as run_module
from easyref_core.training.batches import Batch, MicroBatches, loader
from easyref_core.training.config import Data, Stream
from easyref_core.training.examples import Augmentation
from easyref_core.training.initial import Weights
from easyref_core.training.loop import make_accelerator, train
from easyref_core.training.run import Run
from easyref_core.training.signals import Stopped
from tests.training import tiny


def die(base: Path, output: Path, last: str) -> None:
    """Train until the process is killed at a position beyond `last`."""
    train(tiny.resumable(base, output), tiny.DyingExamples(tiny.config(), int(last)))


def die_in_stream(base: Path, output: Path, shards: str) -> None:
    """Train on shards until the process is killed in its sixth update, after the first micro-batch."""

    class DyingRun(Run):
        def update(self, batches: Iterator[Batch], number: int, measure: bool) -> tuple[torch.Tensor, float]:
            if number == 5:
                next(batches)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().update(batches, number, measure)

    loop.Run = DyingRun
    train(tiny.resumable_stream(base, output, shards))


def gradients(base: Path, output: Path, batch_size: str) -> None:
    """Write each process's gradients of one update, before the optimizer step."""
    _compute_in_float64()
    sizes = {"batch_size": int(batch_size), "accumulation": 2}
    settings = tiny.settings(base, output=output, **tiny.GOLDEN_START, **sizes)
    accelerator = make_accelerator(accumulation=2)
    run = Run(settings, accelerator, tiny.TinyExamples(tiny.config()))
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = loader(MicroBatches(run.examples, settings.batch_size, rank, world), range(2))
    for _ in range(2):
        with accelerator.accumulate(run.prepared):
            accelerator.backward(run.loss(next(batches)))
    torch.save(
        {name: parameter.grad for name, parameter in run.model.named_parameters()},
        output / f"gradients-{rank}-of-{world}.pt",
    )


def broken(base: Path, output: Path, limit: str) -> None:
    """Train two updates on broken rows and write how each process ended."""
    data = Data(procedural={}, augmentation=Augmentation(size=tiny.REFERENCE), max_broken=int(limit))
    settings = tiny.settings(base, output=output / "run", updates=2, data=data)
    try:
        train(settings, tiny.BrokenExamples(tiny.config()))
        end = "finished"
    except ValueError as error:
        end = str(error)
    (output / f"{os.environ['RANK']}.txt").write_text(end)


def stop(base: Path, output: Path, rank: str) -> None:
    """Train while the process of one rank gets SIGTERM in its second update."""

    class StoppedExamples(tiny.TinyExamples):
        def batch(self, positions: range) -> Batch:
            if os.environ["RANK"] == rank and 4 <= min(positions) < 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(positions)

    try:
        train(tiny.settings(base, output=output / "run", updates=4), StoppedExamples(tiny.config()))
    except Stopped as stopped:
        (output / f"{os.environ['RANK']}.txt").write_text(str(stopped))


def stream(base: Path, output: Path, shards: str) -> None:
    """Train two batches in each of two processes, or four in one, and write their samples."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rules = Augmentation(resolution=64, size=84, max_length=None)
    data = Data(stream=Stream((shards,), partitions=2, buffer=4), augmentation=rules)
    options = {"data": data, "batch_size": 1, "updates": 4 // world, "output": output / str(world)}
    settings = tiny.settings(base, **options)
    accelerator = make_accelerator(accumulation=1)
    rank, updates = accelerator.process_index, range(settings.updates)
    seen: list[str] = []
    run = Run(settings, accelerator)
    batches = loader(MicroBatches(run.examples, 1, rank, world), updates)

    def record() -> Iterator[Batch]:
        for batch in batches:
            seen.append(f"{batch.prompts} {batch.seeds.tolist()}")
            yield batch

    for number in updates:
        run.update(record(), number, measure=False)
    (output / f"{rank}-of-{world}.txt").write_text("\n".join(seen))


def launched(base: Path, output: Path, batch_size: str, ema: float | None = 0.9) -> None:
    """Train three updates with everything that a run writes on the way, resuming after the second."""
    _allow_deepspeed_on_a_cpu()
    _allow_fsdp_on_a_cpu()
    bfloat16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    # ZeRO-3 has no float64
    if not bfloat16 and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
        _compute_in_float64()
    loop.open_validation = lambda _: lambda _, config: tiny.TinyExamples(config, groups=3, seed=1)
    for updates in (2, 3):
        settings = tiny.launched(base, output, updates=updates, batch_size=int(batch_size), ema=ema)
        train(settings, tiny.TinyExamples(tiny.config()))


def _allow_deepspeed_on_a_cpu() -> None:
    """Give accelerate a backend for the DeepSpeed of its launch, which it looks for on devices alone."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from deepspeed.ops import __compatible_ops__

        # an extension for faster communication on a CPU, which would be compiled for minutes
        __compatible_ops__["deepspeed_shm_comm"] = False
        PartialState(backend="gloo")


def _allow_fsdp_on_a_cpu() -> None:
    """Make accelerate apply the FSDP of its launch, which it ignores for processes on CPUs."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # in all its instances


def _compute_in_float64() -> None:
    """Reduce rounding errors, which the norms of this tiny UNet amplify. RoPE stays float32."""
    run_module.MIXED["no"] = torch.float64
    load = run_module.load_weights

    def doubled(*arguments: Any) -> Weights:
        weights = load(*arguments)
        return dataclasses.replace(weights, tensors={name: t.double() for name, t in weights.tensors.items()})

    run_module.load_weights = doubled


if __name__ == "__main__":
    complete_cpu_torch()  # before diffusers and transformers are imported
    torch.set_num_threads(1)
    commands = {"die": die, "die_in_stream": die_in_stream, "gradients": gradients, "broken": broken}
    commands |= {"stop": stop, "stream": stream, "launched": launched}
    commands["launched_without_ema"] = partial(launched, ema=None)
    base, *words = sys.argv[1:]
    for command, output, argument in zip(words[::3], words[1::3], words[2::3], strict=True):
        commands[command](Path(base), Path(output), argument)
