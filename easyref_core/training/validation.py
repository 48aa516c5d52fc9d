"""Validation loss: the denoising loss of held-out rows at fixed timesteps, comparable over a whole run.

The training loss says little, because every update draws other timesteps, and the loss of a timestep near 0
is many times that of one near the end. Here rows, noise and timesteps are always the same, and nothing is
dropped.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .batches import Batch, Examples
    from .config import Settings
    from .run import Run

SEED = 2**62  # of the rows' order and noise, whatever the seed of the run


def validation_settings(settings: Settings) -> Settings:
    """The settings with the data set of the validation: all references and texts of the held-out rows."""
    undropped = {"truncation": 0.0, "drop_image": 0.0, "drop_text": 0.0, "drop_both": 0.0}
    data, procedural = settings.data, settings.data.procedural
    changes = {
        "rows": settings.validation.rows if data.rows else None,
        "augmentation": dataclasses.replace(data.augmentation, **undropped),
        "procedural": None if procedural is None else {**procedural, **undropped},
    }
    off = dataclasses.replace(settings.validation, every=0)
    data = dataclasses.replace(data, **changes)
    return dataclasses.replace(settings, data=data, seed=SEED, precomputed=None, validation=off)


@torch.no_grad()
def validate(run: Run, examples: Examples) -> dict[str, float]:
    """Mean loss over the first rows of `examples` at each timestep, and over all timesteps.

    Every process must call it. Each computes the loss of a share of the rows, one row at a time.
    """
    settings, accelerator = run.settings.validation, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    count = min(settings.count, len(examples))
    total = torch.zeros(len(settings.timesteps), dtype=torch.float64)
    with run.evaluating():
        # as many forward passes in every process, because those of sharded models wait for each other
        for first in range(0, count, processes):
            position = first + rank
            batch = examples.batch([min(position, count - 1)])
            run.broken_rows.add(f"validation rows, {reason}" for reason in batch.broken)
            losses = [_loss(run, batch, timestep) for timestep in settings.timesteps]
            if position < count:
                total += torch.stack(losses).to("cpu", torch.float64)
    # float32, because not every device has float64
    means = accelerator.reduce((total / count).float().to(accelerator.device)).tolist()
    each = {f"validation_loss_{t}": mean for t, mean in zip(settings.timesteps, means, strict=True)}
    return {"validation_loss": sum(means) / len(means), **each}


def _loss(run: Run, batch: Batch, timestep: int) -> Tensor:
    return run.loss(batch, torch.tensor([timestep], device=run.accelerator.device))
