"""The one loop: every stage's updates, from a stream of examples to a checkpoint the nodes read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .batches import Examples, loader
from .resume import require_same_run, resume, save_state, saved_states
from .run import Run, learning_rate
from .run_log import Records

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import Settings


def train(settings: Settings, examples: Examples | None = None) -> Path:
    """Train one stage, continuing where a killed run was; the checkpoint's path comes back.

    examples: others than those of settings.data.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    accumulation = GradientAccumulationPlugin(num_steps=settings.accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation)
    if accelerator.is_main_process:
        settings.output.mkdir(parents=True, exist_ok=True)
        require_same_run(settings, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if settings.result.is_file() and max(saved_states(settings.output), default=0) >= settings.updates:
        return settings.result
    run = Run(settings, accelerator, examples)
    start = resume(accelerator, settings.output)
    records = Records(settings.output, start, settings.updates, accelerator.is_main_process)
    try:
        _run_updates(run, records, start)
        run.save(settings.result)
    finally:
        records.close()
        run.model.attachment.remove()
        accelerator.free_memory()
    return settings.result


def _run_updates(run: Run, records: Records, start: int) -> None:
    settings, accelerator = run.settings, run.accelerator
    end = settings.updates
    batches = loader(
        run.examples,
        start,
        end,
        settings.batch_size,
        settings.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
        settings.workers,
    )
    losses, since = [], time.perf_counter()
    for number in range(start, end):
        done = number + 1
        logs = done % settings.log_every == 0 or done == end
        loss, norm = run.update(batches, number, measure=logs)
        losses.append(loss)
        records.advance()
        if logs:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            samples = len(losses) * settings.accumulation * settings.batch_size * accelerator.num_processes
            now = time.perf_counter()
            records.add(
                done,
                {
                    "loss": mean,
                    "learning_rate": learning_rate(settings, number),
                    "gradient_norm": float(norm),
                    "samples_per_second": samples / (now - since),
                },
            )
            losses, since = [], now
        if _due(done, settings.samples.every, end) and accelerator.is_main_process and _whole(accelerator):
            records.add_sheet(done, run.sheet())
        if _due(done, settings.save_every, end):
            save_state(accelerator, settings.output, done, settings.keep)


def _due(done: int, every: int, end: int) -> bool:
    return bool(every) and (done % every == 0 or done == end)


def _whole(accelerator: Accelerator) -> bool:
    """Whether every process holds the whole model: where it is sharded, no single one can paint."""
    from accelerate.utils import DistributedType

    return accelerator.distributed_type != DistributedType.FSDP
