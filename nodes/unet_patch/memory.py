"""Wrapper that reserves memory for K and V of the reference tokens, before the host loads models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .injection import Injection


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryWrapper:
    """PREPARE_SAMPLING wrapper: reserves memory for K and V beside the activations."""

    injections: tuple[Injection, ...]

    def __call__(
        self,
        executor: Any,
        model: ModelPatcher,
        noise_shape: Sequence[int],
        conds: dict,
        model_options: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        # The host uses the shape of the noise only to estimate memory, so K and V are counted as more
        # latents.
        handler = (model_options or {}).get("context_handler")
        frames = min(noise_shape[0], getattr(handler, "context_length", noise_shape[0]))
        itemsize = model.model.get_dtype_inference().itemsize
        needed = sum(injection.nbytes(frames, itemsize) for injection in self.injections)
        latent = model.model.memory_required([1, *noise_shape[1:]])
        shape = [noise_shape[0] + math.ceil(needed / latent), *noise_shape[1:]]
        return executor(model, shape, conds, model_options=model_options, **kwargs)
