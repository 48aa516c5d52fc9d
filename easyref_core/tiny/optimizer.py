"""Optimizers of the pretraining scripts, and helpers for log lines and output folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        self.update()

    def update(self) -> None:
        """Update the parameters by their gradients."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.schedule.step()


class OneCycleMuon:
    """Muon for the matrices inside a model and AdamW for the rest, both with a one-cycle learning rate.

    Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix. The first and
    last layers, embeddings, biases and norms are AdamW's, at the learning rate of the `Training`.

    lr: maximum learning rate of Muon. warmup: fraction of the steps with a rising learning rate.
    weight_decay: of Muon, decoupled; it bounds the largest singular values by its inverse.
    """

    MOMENTUM = 0.95
    COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration, as published
    ITERATIONS = 5
    NOT_INSIDE = "conv_in", "conv_out", "embed", "head"

    def __init__(
        self,
        modules: Iterable[nn.Module],
        training: Training,
        lr: float,
        warmup: float = 0.05,
        weight_decay: float = 0.0,
    ) -> None:
        named = [pair for module in modules for pair in module.named_parameters()]
        inside = {id(p) for name, p in named if p.ndim > 1 and not any(n in name for n in self.NOT_INSIDE)}
        self.matrices = [p for _, p in named if id(p) in inside]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        others = [p for _, p in named if id(p) not in inside]
        self.others = OneCycleAdamW(others, training, weight_decay=0.0, warmup=warmup)
        self.scale, self.weight_decay = lr / training.lr, weight_decay

    def step(self, loss: Tensor) -> None:
        """Backpropagate and update the parameters."""
        for matrix in self.matrices:
            matrix.grad = None
        lr = self.scale * self.others.schedule.get_last_lr()[0]
        self.others.step(loss)
        with torch.no_grad():
            for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
                if matrix.grad is None:  # of a layer that the loss does not use
                    continue
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = self._orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM).flatten(1))
                matrix.mul_(1 - lr * self.weight_decay).add_(update.reshape(matrix.shape), alpha=-lr)

    def state_dict(self) -> dict[str, Any]:
        """The momenta, and the states of AdamW and of its schedule."""
        adam = {"adam": self.others.optimizer.state_dict(), "schedule": self.others.schedule.state_dict()}
        return {"momenta": self.momenta, **adam}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.momenta = state["momenta"]
        self.others.optimizer.load_state_dict(state["adam"])
        self.others.schedule.load_state_dict(state["schedule"])

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """Bring the singular values of a matrix near 1, and scale by its shape."""
        a, b, c = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
        for _ in range(self.ITERATIONS):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return (x.T if tall else x) * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5


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
