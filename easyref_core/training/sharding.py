"""Weights that FSDP and DeepSpeed shard over the processes: the local part, the whole, and a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Module


def sharding_of(accelerator: Accelerator) -> str:
    """Kind of sharding of the model: "none", "fsdp1", "fsdp2", or "zero1" to "zero3" of DeepSpeed."""
    from accelerate.utils import DistributedType

    state = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{state.fsdp_plugin.fsdp_version}"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{state.deepspeed_plugin.zero_stage}"
    return "none"


def shards_weights(accelerator: Accelerator) -> bool:
    """True if no process has all weights, so that every forward pass needs all processes."""
    return sharding_of(accelerator) in ("fsdp1", "fsdp2", "zero3")


def disable_zero3_init(accelerator: Accelerator) -> None:
    """Keep transformers from partitioning the models that it loads next.

    accelerate announces ZeRO-3 to transformers whatever zero3_init_flag is. The frozen models run outside
    DeepSpeed's engine, which alone gathers partitioned weights.
    """
    if sharding_of(accelerator) == "zero3":
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def local_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process has: of FSDP2's DTensor, of ZeRO-3's parameter, or all."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Every process must call it for a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` if that is a DTensor."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements)


@contextmanager
def callable_submodules(accelerator: Accelerator, model: Module) -> Iterator[None]:
    """Make parts of a sharded model callable, which a training step only does through the model's forward.

    Every process must run the same forward passes inside. The blocks that are sharded by themselves gather
    their weights as usual; this gathers the rest.
    """
    sharding = sharding_of(accelerator)
    if sharding == "fsdp2":
        model.unshard()
        try:
            yield
        finally:
            # else the next forward pass would take these weights for the current ones
            model.reshard()
    elif sharding == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
    elif sharding == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield
    else:
        yield
