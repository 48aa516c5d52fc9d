"""Exponential moving average (EMA) of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import shard_like, whole_tensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class EMA:
    """Moving average of parameters; its state is saved and loaded with the run's.

    Args:
        parameters: of which those with gradients are averaged, on their device and sharded as they are.
        decay: upper limit of the decay, which is (1 + n) / (10 + n) after n updates, because the first
            weights are far from the later ones.
        main: True in the process that writes the state, the only one that needs it whole.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float, main: bool = True) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.averages = [parameter.detach().float().clone() for parameter in self.parameters]
        self.max_decay, self.main, self.updates = decay, main, 0

    @property
    def decay(self) -> float:
        """Weight of the average in the next update."""
        return min(self.max_decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; to be called after every update."""
        current = [parameter.detach().float() for parameter in self.parameters]
        get_ema_multi_avg_fn(self.decay)(self.averages, current, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the parameters, and the parameters' own values back at the end."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            _copy(self.averages, self.parameters)
            yield
        finally:
            _copy(trained, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Number of updates, and the whole averages in the main process. Every process must call it."""
        averages = [whole_tensor(average) for average in self.averages]
        return {"updates": self.updates, "averages": [a.cpu() for a in averages] if self.main else []}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, whatever number of processes has saved it."""
        self.updates = state["updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(shard_like(saved.to(average.device), average))


@torch.no_grad()
def _copy(values: Iterable[Tensor], parameters: Iterable[Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
