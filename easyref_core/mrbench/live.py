"""MRBench on the weights in training: images and scores of a run after some of its updates.

Every update is a method, named by its number, so that the images are in mrbench/images/<update>/ of the run's
output, and mrbench/scores/ compares the updates as a benchmark compares methods.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .generate import RunSettings, generate, limit_groups
from .group_scores import Extractors, load_extractors
from .manifest import Manifest, read_manifest
from .methods import Method, Sampling, Task
from .processes import this_process
from .rows import METRICS, Row
from .score import score

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.config import Benchmark
    from ..training.run import Run


@dataclasses.dataclass(eq=False)
class LiveMethod(Method):
    """The weights of a run, which are attached to its UNet already."""

    kind = "live"
    condition_remedy = "Lower the run's learning_rate, or set clip to 1.0."

    run: Run
    update: int
    empty: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "update": self.update}

    def batch_key(self, task: Task) -> Hashable:
        return len(task.references) if self.run.settings.aggregation == "concatenation" else None

    def prepare(self, task: Task, folder: Path) -> Tensor:
        return self.run.reference_tokens(task.references, task.prompt)

    @contextmanager
    def attach(self, conditions: Sequence[Tensor], seeds: int) -> Iterator[None]:
        """The next training step conditions the UNet anew, so there is nothing to restore."""
        self.run.condition(torch.cat(list(conditions)).repeat_interleave(seeds, dim=0), self.empty)
        yield


def open_benchmark(settings: Benchmark, device: str) -> Callable[[Run, int], dict[str, float]]:
    """Load the manifest and the extractors, and return the function that measures a run.

    Raises FileNotFoundError or ValueError for a manifest that cannot be used.
    """
    manifest = limit_groups(read_manifest(settings.manifest), settings.groups)
    names = {name: getattr(settings, name) for name in ("clip", "dino", "offline")}
    extractors = load_extractors(manifest, device, **names)

    def measure(run: Run, update: int) -> dict[str, float]:
        return measure_run(run, update, settings, manifest, extractors)

    return measure


@torch.no_grad()
def measure_run(
    run: Run, update: int, settings: Benchmark, manifest: Manifest, extractors: Extractors
) -> dict[str, float]:
    """Generate and score the images of a run's weights. Returns the mean of every metric in the main process.

    Every process must call it, and generates a share of the groups.
    """
    folder, name = run.settings.output / "mrbench", f"{update:07}"
    sampling = {key: getattr(settings, key) for key in ("size", "steps", "guidance", "negative")}
    options = RunSettings(out=folder / "images", sampling=Sampling(**sampling), seeds=settings.seeds)
    with run.accelerator.autocast(), run.evaluating():
        method = LiveMethod(run.base, run, update, run.unconditional_tokens())
        generate(manifest, method, name, options)
    outcome = score(settings.manifest, options.out, folder / "scores", extractors, process=this_process())
    return means([row for row in outcome.rows if row.method == name]) if outcome else {}


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of every metric that was measured, with names for a log."""
    values = {metric: [getattr(row, metric) for row in rows] for metric in METRICS}
    measured = {metric: [v for v in column if not math.isnan(v)] for metric, column in values.items()}
    return {f"mrbench_{metric}": sum(column) / len(column) for metric, column in measured.items() if column}
