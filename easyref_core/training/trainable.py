"""EasyRef as a module with parameters: the group encoder, the aggregator, K and V, and the attention LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..checkpoint.checkpoint import LORA_PREFIX
from ..checkpoint.modules import CheckpointModules
from ..mllm.qwen2_vl import SkipInit
from ..unet.diffusers_unet import attach
from .batches import pad_left
from .initial import Weights
from .stages import Stage, group_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from .base_model import Text
    from .batches import Batch

# How the tokens of a group come about: all references read together, or each alone and then joined (paper, table 5).
AGGREGATIONS = ("easyref", "average", "concatenation")


class LowRank(nn.Module):
    """The update of one layer: up(down(x))."""

    def __init__(self, width: int, out: int, rank: int, **factory: object) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, **factory)
        self.up = nn.Linear(rank, out, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class TrainableEasyRef(nn.Module):
    """What a stage trains, attached to a UNet for good.

    The UNet, and the MLLM's body where it is frozen, are held unregistered: they are in no optimizer, no checkpoint
    and no bucket of DistributedDataParallel, and stay in the dtype they come in.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        weights: Weights,
        stage: Stage,
        image_token: int,
        *,
        aggregation: str = "easyref",
        gradient_checkpointing: bool = False,
        frozen_dtype: torch.dtype = torch.float32,
    ) -> None:
        """image_token: id of <|image_pad|>. frozen_dtype: of the MLLM's body where it is frozen."""
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"The aggregation is {aggregation!r}; wanted one of {', '.join(AGGREGATIONS)}.")
        config = weights.config
        self.config, self.sites, self.stage, self.image_token = config, weights.sites, stage, image_token
        self.aggregation = aggregation
        self._unregistered = {"unet": unet}
        widths = dict(zip(weights.sites, weights.inner, strict=True))
        modules = CheckpointModules(config, widths, SkipInit, device="meta")
        lora = {n: tensor for n, tensor in weights.tensors.items() if n.startswith(LORA_PREFIX)}
        modules.load_state_dict({n: t for n, t in weights.tensors.items() if n not in lora}, assign=True)
        encoder = modules.encoder
        if stage.body_frozen:
            self._unregistered["encoder"] = encoder.requires_grad_(False).to(unet.device, frozen_dtype)
        else:
            self.encoder = encoder
        self.aggregator, self.kv = modules.aggregator, modules.kv
        self.lora = _low_ranks(lora)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(group_of(tensor_name(name)) in stage.trains)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            blocks = [*encoder.visual.blocks, *encoder.layers] if not stage.body_frozen else []
            for block in [*blocks, *self.aggregator.layers]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.store: Callable[[Batch], Tensor] | None = (
            None  # gives a batch's context states in place of the body
        )
        self.attachment = attach(unet, {_layer_path(key): update for key, update in self.lora.items()})

    def __getattr__(self, name: str) -> object:
        """The UNet and a frozen encoder, which are no submodules."""
        beside = self.__dict__.get("_unregistered", {})
        return beside[name] if name in beside else super().__getattr__(name)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Text, batch: Batch) -> Tensor:
        """Noisy latents (B, 4, h, w) at `timesteps` (B,) -> the noise predicted in them (B, 4, h, w)."""
        tokens, real = self.padded_tokens(batch)
        self.condition(tokens, real)
        return self.predict(noisy, timesteps, text, batch.time_ids)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        """The UNet's prediction under the references of the last `condition`."""
        dtype = next(self.unet.parameters()).dtype
        sizes = {"text_embeds": text.pooled.to(dtype), "time_ids": time_ids}
        return self.unet(
            noisy.to(dtype), timesteps, text.states.to(dtype), added_cond_kwargs=sizes, return_dict=False
        )[0]

    def condition(self, tokens: Tensor, real: Tensor | None = None) -> None:
        """Let the UNet attend to reference tokens (rows, T, C), real (rows, T) where rows differ in length."""
        self.attachment.condition(self.kv(tokens), real)

    def tokens(self, batch: Batch) -> Tensor:
        """Reference tokens of each group: (B, T, C)."""
        return self.padded_tokens(batch)[0]

    def padded_tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Reference tokens (B, T, C), and which of them are real (B, T) where groups have different counts of them."""
        if self.aggregation == "easyref":
            read = batch.patches, batch.grid, batch.input_ids, batch.real
            context = self.context(*read) if self.store is None else self.store(batch)
            return self._aggregate(context, batch.real), None
        ids = [
            alone
            for row, real, count in zip(batch.input_ids, batch.real, batch.references, strict=True)
            for alone in one_by_one(row[real], self.image_token, count)
        ]
        ids, real = (part.to(batch.real.device) for part in pad_left(ids))
        # -> (sum of K, T, C)
        each = self._aggregate(self.context(batch.patches, batch.grid, ids, real), real)
        groups = each.split(batch.references)
        if self.aggregation == "average":
            return torch.stack([group.mean(dim=0) for group in groups]), None
        rows = [group.flatten(0, 1) for group in groups]
        real = pad_sequence([row.new_ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), None if real.all() else real

    def context(self, patches: Tensor, grid: Tensor, input_ids: Tensor, real: Tensor) -> Tensor:
        """Context states (B, S, D) of a batch of groups, without gradients where the body is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stage.body_frozen):
            dtype = self.encoder.embed_tokens.weight.dtype
            return self.encoder(patches, grid, input_ids, self.image_token, dtype, _padding(real))

    def _aggregate(self, context: Tensor, real: Tensor) -> Tensor:
        weight = self.aggregator.norm.weight
        return self.aggregator(context.to(weight.device, weight.dtype), _padding(real))


def _padding(real: Tensor) -> Tensor | None:
    """None where nothing is padded: attention is faster without a mask."""
    return None if real.all() else real


def one_by_one(input_ids: Tensor, image_token: int, references: int) -> list[Tensor]:
    """The ids (S,) of a question about a group -> the ids of the same question about each reference alone."""
    image = input_ids == image_token
    edges = torch.diff(image.int(), prepend=image.new_zeros(1).int(), append=image.new_zeros(1).int())
    # with the marks around it
    starts, ends = (
        (edges == 1).nonzero()[:, 0] - 1,
        (edges == -1).nonzero()[:, 0] + 1,
    )
    if len(starts) != references:
        raise ValueError(
            f"The question shows {len(starts)} references where the group has {references}: it was cut inside them. "
            "Raise max_length."
        )
    before, after = input_ids[: starts[0]], input_ids[ends[-1] :]
    return [torch.cat([before, input_ids[start:end], after]) for start, end in zip(starts, ends, strict=True)]


def tensor_name(parameter: str) -> str:
    """Name of a parameter of TrainableEasyRef -> name of the tensor as easyref_core.checkpoint.checkpoint.save takes it."""
    match = re.fullmatch(r"lora\.(.+)/(to_\w+)\.(down|up)\.weight", parameter)
    return _lora_name(match[1].replace("/", "."), match[2], match[3]) if match else parameter


def _lora_name(attention: str, part: str, side: str) -> str:
    return f"unet.{attention}.processor.{part}_lora.{side}.weight"


def _layer_path(key: str) -> str:
    """Key in the LoRA's ModuleDict, whose keys may hold no dots -> path of the layer in the UNet."""
    return key.replace("/", ".")


def _low_ranks(tensors: Mapping[str, Tensor]) -> nn.ModuleDict:
    lora = nn.ModuleDict()
    for name, down in tensors.items():
        if match := re.fullmatch(r"unet\.(.+)\.processor\.(to_\w+)_lora\.down\.weight", name):
            up = tensors[_lora_name(match[1], match[2], "up")]
            update = LowRank(down.shape[1], up.shape[0], down.shape[0], device="meta")
            update.load_state_dict({"down.weight": down, "up.weight": up}, assign=True)
            lora[f"{match[1]}.{match[2]}".replace(".", "/")] = update
    return lora
