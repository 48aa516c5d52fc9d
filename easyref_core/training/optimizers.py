"""Optimizers of a run, by the name in its settings: AdamW, AdamW with 8-bit moments, Adafactor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn import Parameter

    from .config import Settings


def make_optimizer(settings: Settings, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The optimizer of settings.optimizer. Raises ValueError if its package is not installed."""
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    return OPTIMIZERS[settings.optimizer](list(parameters), **options)


def _adamw_8bit(parameters: list[Parameter], **options: Any) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer adamw_8bit needs bitsandbytes, which cannot be imported ({error}). Run "
            "pip install -e '.[train,train-8bit]', or set optimizer to adafactor."
        ) from error
    return AdamW8bit(parameters, **options)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw_8bit": _adamw_8bit,
    # The rate is relative to the root mean square of each tensor; there is no first moment.
    "adafactor": torch.optim.Adafactor,
}
