"""Training loop: runs all updates of a stage, from a stream of examples to a checkpoint."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .batches import Examples, LoadExamples, MicroBatches, loader
from .profiling import profiler
from .resume import require_same_run, resume, run_lock, samples_before, save_state, saved_states
from .run import Run, learning_rate, open_dataset
from .run_log import RunLog, require_trackers
from .sharding import sharding_of, shards_weights
from .signals import Stopped, stop_trigger
from .throughput import Throughput
from .validation import validate, validation_settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from .config import Settings


# Function (settings.benchmark, device) -> MeasureRun. It is named and not imported, because MRBench is built
# on this package.
BENCHMARK = "easyref_core.mrbench.live:open_benchmark"

MeasureRun = Callable[[Run, int], dict[str, float]]  # a run and its update -> values for the log
Measure = tuple[int, Callable[[int], dict[str, float]]]  # updates between calls, update -> values for the log


def train(settings: Settings, examples: Examples | LoadExamples | None = None) -> Path:
    """Train one stage, resuming from its newest saved state. Returns the path of the checkpoint.

    examples: the data set, or a function that loads it; None opens the one of settings.data.
    Raises NotFiniteError for a loss or a trained weight that is NaN or infinite, and ValueError for more
    broken rows than settings.data.max_broken; then the good states remain and no checkpoint is written.
    Raises Stopped if a signal ends the run; then its last update is saved and no checkpoint is written.
    """
    accelerator = make_accelerator(settings.accumulation, settings.trackers, settings.output)
    with ExitStack() as stack:
        _claim_output(settings, accelerator, stack)
        if not settings.result.is_file() or max(saved_states(settings.output), default=0) < settings.updates:
            held_out, benchmark = open_validation(settings), open_benchmark(settings, accelerator)
            _train(Run(settings, accelerator, examples), held_out, benchmark)
    return settings.result


def open_benchmark(settings: Settings, accelerator: Accelerator) -> MeasureRun | None:
    """Load the benchmark's manifest and models and return the function that runs it; None without one."""
    if not settings.benchmark.every:
        return None
    if shards_weights(accelerator):
        raise ValueError(
            f"benchmark.every is {settings.benchmark.every}, expected 0, because {sharding_of(accelerator)} "
            "shards the weights. Set export_every, and run MRBench on those checkpoints."
        )
    return pkgutil.resolve_name(BENCHMARK)(settings.benchmark, str(accelerator.device))


def open_validation(settings: Settings) -> LoadExamples | None:
    """Check the data set of the validation and return the function that loads it; None without validation."""
    return open_dataset(validation_settings(settings)) if settings.validation.every else None


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
            require_same_run(settings, accelerator.num_processes, sharding_of(accelerator))
        except (ValueError, OSError) as error:
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


def _train(run: Run, held_out: LoadExamples | None, benchmark: MeasureRun | None) -> None:
    """Resume, run the remaining updates and write the checkpoint."""
    settings, accelerator = run.settings, run.accelerator
    start = resume(accelerator, settings.output)
    run_log = RunLog(settings, accelerator, start)
    try:
        measures: list[Measure] = []
        if held_out:
            measures.append((settings.validation.every, _validation(run, held_out)))
        if benchmark:
            measures.append((settings.benchmark.every, partial(benchmark, run)))
        with stop_trigger(accelerator):
            _run_updates(run, run_log, start, measures)
        run.save(settings.result)
    finally:
        run_log.close()
        run.close()


def _validation(run: Run, held_out: LoadExamples) -> Callable[[int], dict[str, float]]:
    examples = held_out(run.base, run.weights.config)
    return lambda _: validate(run, examples)


def make_accelerator(
    accumulation: int, trackers: Iterable[str] = (), output: Path | None = None
) -> Accelerator:
    """Accelerator that accumulates gradients over a fixed number of micro-batches and logs to `trackers`."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    trackers = list(trackers)
    require_trackers(trackers)
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    project = ProjectConfiguration(logging_dir=str(output / "tensorboard") if output else None)
    options = {"log_with": trackers or None, "project_config": project}
    return Accelerator(gradient_accumulation_plugin=plugin, **options)


def _run_updates(run: Run, run_log: RunLog, start: int, measures: Sequence[Measure]) -> None:
    settings, accelerator, end = run.settings, run.accelerator, run.settings.updates
    processes = accelerator.num_processes
    first = samples_before(settings, start, processes)
    samples_per_update = settings.accumulation * settings.batch_size * processes
    micro_batches = MicroBatches(
        run.examples, settings.batch_size, accelerator.process_index, processes, first=first
    )
    batches = loader(micro_batches, range((end - start) * settings.accumulation), settings.workers)
    throughput, losses = Throughput(batches, processes, accelerator.device), []
    with profiler(accelerator, settings.output / "profile", settings.profile_updates) as profile:
        for number in range(start, end):
            done = number + 1
            logs = _due(done, settings.log_every, end)
            loss, norm = run.update(throughput, number, measure=logs)
            losses.append(loss)
            run_log.advance()
            profile.step()
            stops = accelerator.check_trigger()
            values: dict[str, float] = {}
            if logs or stops:
                values = {
                    "loss": _mean_loss(run, losses, done),
                    "learning_rate": learning_rate(settings, number),
                    **({"gradient_norm": float(norm)} if logs else {}),
                    **throughput.read(),
                }
                losses = []
            with throughput.paused():
                for every, measure in measures:
                    if _due(done, every, end):
                        values |= measure(done)
                if values:
                    run_log.log(done, values)
                samples = first + (done - start) * samples_per_update
                _write_results(run, run_log, done, samples, saves=stops)
            if stops:
                raise Stopped(
                    f"A signal stopped {settings.stage} after update {done} of {end}, whose state is saved. "
                    "Start again to continue."
                )


def _mean_loss(run: Run, losses: list[Tensor], done: int) -> float:
    """Mean of some updates over all processes. Raises an error in all processes if the run must not go on."""
    mean = run.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
    run.broken_rows.synchronize()
    run.require_finite("the loss", mean, f"{run.settings.stage}, update {done}")
    return mean


def _write_results(run: Run, run_log: RunLog, done: int, samples: int, saves: bool) -> None:
    """Write what is due after `done` updates: sample sheet, checkpoint, state. saves: a state anyway."""
    settings, accelerator, end = run.settings, run.accelerator, run.settings.updates
    saves = saves or _due(done, settings.save_every, end)
    exports = _due(done, settings.export_every, end) and done < end
    if saves or exports:
        run.require_finite_weights(done)
    if _due(done, settings.samples.every, end):
        main = accelerator.is_main_process
        sheet = run.sample_sheet() if main or shards_weights(accelerator) else None
        if main:
            run_log.log_samples(done, sheet)
    if exports:
        run.save(settings.checkpoint_of(done))
    if saves:
        save_state(accelerator, settings, done, samples)


def _due(done: int, every: int, end: int) -> bool:
    return bool(every) and (done % every == 0 or done == end)
