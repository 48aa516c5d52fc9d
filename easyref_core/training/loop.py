"""Training loop: runs all updates of a stage, from a stream of examples to a checkpoint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .batches import Examples, LoadExamples, MicroBatches, loader
from .resume import require_same_run, resume, run_lock, save_state, saved_states
from .run import Run, learning_rate
from .run_log import RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import Settings


def train(settings: Settings, examples: Examples | LoadExamples | None = None) -> Path:
    """Train one stage, resuming from its newest saved state. Returns the path of the checkpoint.

    examples: the data set, or a function that loads it; None opens the one of settings.data.
    Raises NotFiniteError for a loss or a trained weight that is NaN or infinite, and ValueError for more
    broken rows than settings.data.max_broken; then the good states remain and no checkpoint is written.
    """
    accelerator = make_accelerator(settings.accumulation)
    with ExitStack() as stack:
        _claim_output(settings, accelerator, stack)
        if not settings.result.is_file() or max(saved_states(settings.output), default=0) < settings.updates:
            _train(Run(settings, accelerator, examples))
    return settings.result


def _claim_output(settings: Settings, accelerator: Accelerator, stack: ExitStack) -> None:
    """Lock and check the output folder in the main process, until `stack` closes.

    Its error is raised in every process, because the others would wait for it otherwise.
    """
    from accelerate.utils import broadcast_object_list

    errors: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            settings.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_lock(settings.output))
            require_same_run(settings, accelerator.num_processes)
        except (ValueError, OSError) as error:
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


def _train(run: Run) -> None:
    """Resume, run the remaining updates and write the checkpoint."""
    settings, accelerator = run.settings, run.accelerator
    start = resume(accelerator, settings.output)
    run_log = RunLog(settings.output, start, settings.updates, accelerator.is_main_process)
    try:
        _run_updates(run, run_log, start)
        run.save(settings.result)
    finally:
        run_log.close()
        run.close()


def make_accelerator(accumulation: int) -> Accelerator:
    """Accelerator that accumulates gradients over a fixed number of micro-batches."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    return Accelerator(gradient_accumulation_plugin=plugin)


def _run_updates(run: Run, run_log: RunLog, start: int) -> None:
    from accelerate.utils import DistributedType

    settings, accelerator, end = run.settings, run.accelerator, run.settings.updates
    rank, world_size = accelerator.process_index, accelerator.num_processes
    micro_batches = MicroBatches(run.examples, settings.batch_size, rank, world_size)
    steps = range(start * settings.accumulation, end * settings.accumulation)
    batches = loader(micro_batches, steps, settings.workers)
    # no process of FSDP holds the full model, so none can generate sample images
    samples_every = 0 if accelerator.distributed_type == DistributedType.FSDP else settings.samples.every
    losses, since = [], time.perf_counter()
    for number in range(start, end):
        done = number + 1
        logs = done % settings.log_every == 0 or done == end
        loss, norm = run.update(batches, number, measure=logs)
        losses.append(loss)
        run_log.advance()
        if logs:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            run.broken_rows.synchronize()
            run.require_finite("the loss", mean, f"{settings.stage}, update {done}")
            samples = len(losses) * settings.accumulation * settings.batch_size * world_size
            now = time.perf_counter()
            values = {
                "loss": mean,
                "learning_rate": learning_rate(settings, number),
                "gradient_norm": float(norm),
                "samples_per_second": samples / (now - since),
            }
            run_log.log(done, values)
            losses, since = [], now
        saves = _due(done, settings.save_every, end)
        if saves:
            run.require_finite_weights(done)
        if _due(done, samples_every, end) and accelerator.is_main_process:
            run_log.log_samples(done, run.sample_sheet())
        if saves:
            save_state(accelerator, settings.output, done, settings.keep)


def _due(done: int, every: int, end: int) -> bool:
    return bool(every) and (done % every == 0 or done == end)
