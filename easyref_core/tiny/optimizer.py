"""Optimizer shared by all pretraining scripts, and helpers for log lines and output folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Log = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """Hyperparameters of a pretraining."""

    steps: int
    batch: int
    lr: float  # maximum of the one-cycle schedule
    seed: int

    def logs(self, step: int, every: int = 100) -> bool:
        """True if this step has a log line."""
        return step % every == 0 or step == self.steps - 1


class OneCycleAdamW:
    """AdamW with a one-cycle learning rate and clipped gradients.

    warmup: fraction of the steps with a rising learning rate. max_norm: None does not clip.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        training: Training,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        max_norm: float | None = 1.0,
    ) -> None:
        self.parameters, self.max_norm = list(parameters), max_norm
        self.optimizer = torch.optim.AdamW(self.parameters, lr=training.lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, training.lr, total_steps=training.steps, pct_start=warmup
        )

    def step(self, loss: Tensor) -> None:
        """Backpropagate and update the parameters."""
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.schedule.step()


def timed(log: Log) -> Log:
    """Prefix every line with the seconds since this call."""
    started = time.monotonic()
    return lambda line: log(f"{time.monotonic() - started:6.0f} s  {line}")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder and rename it at the end, so that `folder` exists only when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    yield partial
    partial.rename(folder)
