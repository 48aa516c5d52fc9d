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


# Bytes of a parameter's moments, with float32 weights. AdamW's have the dtype of the weights; 8-bit ones have
# two float32 scales for each 256 values; Adafactor has a row and a column in place of a matrix.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "adafactor": 0.01}


def state_bytes(optimizer: str, weight_dtype: str) -> float:
    """Bytes of a trained parameter's weight, gradient and moments."""
    if weight_dtype == "float32":
        return 4 + 4 + MOMENT_BYTES[optimizer]
    return 2 + 2 + MOMENT_BYTES[optimizer] / (2 if optimizer == "adamw" else 1)


def copy_bytes(weight_dtype: str) -> int:
    """Bytes of the bfloat16 copy of a trained parameter that mixed precision computes with."""
    return 2 if weight_dtype == "float32" else 0


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw_8bit": _adamw_8bit,
    # The rate is relative to the root mean square of each tensor; there is no first moment.
    "adafactor": torch.optim.Adafactor,
}
