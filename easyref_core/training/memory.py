"""Memory of a run on its device, counted before the first update, so that one that cannot fit says so."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .full_size import Sizes, Workload, step_cost, vae_cost
from .optimizers import copy_bytes, state_bytes
from .precomputed import read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .base_model import BaseModel
    from .config import Settings
    from .initial import Weights

log = logging.getLogger(__name__)

RESERVE_BYTES = 1.0e9  # assumption: context of the device, workspaces and fragmentation


@dataclass(frozen=True)
class MemoryCount:
    """Bytes on the device. Activations are a lower bound: the peak of the tensors alive at one time."""

    frozen: int
    trained: float
    activations: int

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.activations + RESERVE_BYTES

    def __str__(self) -> str:
        parts = {"frozen weights": self.frozen, "trained weights and optimizer": self.trained}
        parts |= {"activations": self.activations, "reserve": RESERVE_BYTES}
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        return f"about {self.total / 1e9:.1f} GB ({listed})"


def device_bytes(device: torch.device) -> int | None:
    """Memory of a device; None where torch does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return None


def require_memory(settings: Settings, base: BaseModel, weights: Weights, references: int | None) -> None:
    """Raise ValueError if the run cannot fit on the base's device; a warning where that is unknown.

    references: the most of a group, None if unknown. settings.memory_check false makes the error a warning.
    A CPU is not checked, because its memory is shared and can be swapped.
    """
    if base.device.type == "cpu":
        return
    count = count_memory(settings, base, weights, references or 1)
    if references is None:
        log.warning("The number of references is unknown; activations are counted for groups of one.")
    available = device_bytes(base.device)
    if available is None:
        log.warning(
            "The memory of %s is unknown, so it is not checked. The run takes %s.", base.device, count
        )
        return
    log.info("The run takes %s of %.1f GB.", count, available / 1e9)
    if count.total > available:
        text = f"The run takes {count}, but {base.device} has {available / 1e9:.1f} GB. {_remedy(settings)}"
        if settings.memory_check:
            raise ValueError(f"{text} Set memory_check to false to try it nevertheless.")
        log.warning("%s", text)


def count_memory(settings: Settings, base: BaseModel, weights: Weights, references: int) -> MemoryCount:
    """Count the memory of a run whose models are loaded into main memory, by their sizes."""
    rules, stage = settings.data.augmentation, settings.stage_spec
    sizes = Sizes(weights.config, dict(base.unet.config), dict(base.vae.config), pooled=_pooled(base))
    parked = set(base.parked)
    # an image in native aspect is not resized up to 1.1 times the resolution along both sides
    side = int(rules.resolution * (1.1 if rules.native else 1))
    workload = Workload(
        stage=stage,
        batch=settings.batch_size,
        references=references,
        checkpointing=settings.gradient_checkpointing,
        mllm_lora_rank=settings.mllm_lora_rank,
        precomputed=frozenset({"contexts"} if _body_parked(settings) else ()),
        side=-(-side // 64) * 64,
        size=rules.size,
    )
    # the meta device counts bfloat16; without mixed precision activations take twice as much
    activations = step_cost(workload, sizes).peak_bytes * base.unet.dtype.itemsize // 2
    if "vae" not in parked:
        activations = max(activations, vae_cost(settings.batch_size, workload.side, sizes).peak_bytes)
    frozen = sum(
        parameter.nbytes
        for name in base.MODELS
        if name not in parked
        for parameter in getattr(base, name).parameters()
    )
    if (stage.body_frozen or settings.mllm_lora_rank) and not _body_parked(settings):
        body = {name: t for name, t in weights.tensors.items() if name.startswith("encoder.")}
        frozen += numel(body) * base.unet.dtype.itemsize
    per_parameter = state_bytes(settings.optimizer, settings.weight_dtype)
    per_parameter += copy_bytes(settings.weight_dtype) if base.unet.dtype != torch.float32 else 0
    per_parameter += 4 if settings.ema else 0
    return MemoryCount(frozen, numel(weights.trained(stage)) * per_parameter, activations)


def numel(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _body_parked(settings: Settings) -> bool:
    return bool(settings.precomputed) and "contexts" in read_manifest(settings.precomputed)["parts"]


def _pooled(base: BaseModel) -> int:
    return base.text_encoder_2.config.projection_dim


def _remedy(settings: Settings) -> str:
    """The levers that the run does not use yet."""
    levers = {
        "gradient_checkpointing to true": not settings.gradient_checkpointing,
        "batch_size to 1 and accumulation higher": settings.batch_size > 1,
        "precomputed to a folder": settings.precomputed is None and settings.data.rows is not None,
        "mllm_lora_rank to 64": not settings.stage_spec.body_frozen and not settings.mllm_lora_rank,
        "optimizer to adamw_8bit or adafactor": settings.optimizer == "adamw",
        "max_references or resolution lower": True,
    }
    return f"Set {'; '.join(lever for lever, unused in levers.items() if unused)}."
