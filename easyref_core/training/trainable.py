"""EasyRef as a trainable module: group encoder, aggregator, K/V projections and attention LoRA."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..checkpoint.checkpoint import LORA_PREFIX
from ..checkpoint.modules import CheckpointModules
from ..mllm.qwen2_vl import DecoderLayer, SkipInit, VisionBlock
from ..unet.diffusers_unet import add_update, attach
from .batches import pad_left
from .initial import MLLM_LORA_PREFIX, Weights
from .stages import Stage, group_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from .base_model import Text
    from .batches import Batch

# All references encoded together, or each alone and then averaged or concatenated (paper, table 5).
AGGREGATIONS = ("easyref", "average", "concatenation")


class TrainableEasyRef(nn.Module):
    """The trainable modules of a stage, attached to a UNet until `attachment.remove()`.

    `unet`, and `encoder` where the body is frozen, are not registered as submodules: they are in no
    optimizer, no checkpoint and no bucket of DistributedDataParallel, and keep their dtype.
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
        body_device: torch.device | str | None = None,
    ) -> None:
        """image_token: id of <|image_pad|>.

        frozen_dtype, body_device: of a frozen MLLM body; None is the UNet's device. The body is frozen in
        stage 1, and where `weights` have a LoRA of it (initial.fresh_mllm_lora).
        """
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation is {aggregation!r}, expected one of {', '.join(AGGREGATIONS)}.")
        config = weights.config
        self.config, self.sites, self.stage, self.image_token = config, weights.sites, stage, image_token
        self.aggregation = aggregation
        self.__dict__["unet"] = unet
        modules = CheckpointModules(config, weights.widths, SkipInit, device="meta")
        prefixes = (LORA_PREFIX, MLLM_LORA_PREFIX)
        lora, mllm_lora = (
            {name: t for name, t in weights.tensors.items() if name.startswith(prefix)} for prefix in prefixes
        )
        own = {name: t for name, t in weights.tensors.items() if not name.startswith(prefixes)}
        modules.load_state_dict(own, assign=True)
        if stage.body_frozen or mllm_lora:
            encoder = modules.encoder.requires_grad_(False).to(body_device or unet.device, frozen_dtype)
            self.__dict__["encoder"] = encoder
        else:
            self.encoder = modules.encoder
        self.aggregator, self.kv = modules.aggregator, modules.kv
        self.lora = _lora_layers(lora)
        self.mllm_lora = _mllm_lora_layers(mllm_lora)
        for key, layer in self.mllm_lora.items():
            adapted = self.encoder.get_submodule(_layer_path(key))
            adapted.register_forward_hook(partial(add_update, layer, 1.0))
        # FSDP shards each of these by itself; accelerate reads the attribute of transformers' models
        blocks = (DecoderLayer, VisionBlock)
        self._no_split_modules = sorted({type(m).__name__ for m in self.modules() if isinstance(m, blocks)})
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(group_of(tensor_name(name)) in stage.trains)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            blocks = [] if stage.body_frozen else [*self.encoder.visual.blocks, *self.encoder.layers]
            for block in [*blocks, *self.aggregator.layers]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.attachment = attach(unet, {_layer_path(key): layer for key, layer in self.lora.items()})

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Text, batch: Batch, context: Tensor | None = None
    ) -> Tensor:
        """Predict noise, velocity or latents (B, 4, h, w), as the base does, from noisy latents.

        timesteps: (B,). context: precomputed context states of the batch, see `tokens_and_mask`.
        """
        self.condition(*self.tokens_and_mask(batch, context))
        return self.predict(noisy, timesteps, text, batch.time_ids)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        """Run the UNet with the most recently set reference tokens."""
        dtype = next(self.unet.parameters()).dtype
        sizes = {"text_embeds": text.pooled.to(dtype), "time_ids": time_ids}
        return self.unet(
            noisy.to(dtype), timesteps, text.states.to(dtype), added_cond_kwargs=sizes, return_dict=False
        )[0]

    def condition(self, tokens: Tensor, token_mask: Tensor | None = None) -> None:
        """Condition the UNet on reference tokens (rows, T, C); token_mask (rows, T) is False at padding."""
        self.attachment.condition(self.kv(tokens), token_mask)

    def tokens(self, batch: Batch, context: Tensor | None = None) -> Tensor:
        """Reference tokens (B, T, C) of each group."""
        return self.tokens_and_mask(batch, context)[0]

    def tokens_and_mask(self, batch: Batch, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Reference tokens (B, T, C) and their mask (B, T), None if no group is padded.

        context: context states (B, S, D) of the batch for aggregation "easyref"; None computes them. The
        other aggregations encode each reference alone and have no use for them.
        """
        if self.aggregation == "easyref":
            if context is None:
                context = self.context(batch.patches, batch.grid, batch.input_ids, batch.padding_mask)
            return self._aggregate(context, batch.padding_mask), None
        rows = [
            ids
            for row, mask, count in zip(batch.input_ids, batch.padding_mask, batch.references, strict=True)
            for ids in split_references(row[mask], self.image_token, count)
        ]
        ids, mask = (tensor.to(batch.input_ids.device) for tensor in pad_left(rows))
        tokens = self.encode(batch.patches, batch.grid, ids, mask)  # (sum of K, T, C)
        groups = tokens.split(batch.references)
        if self.aggregation == "average":
            return torch.stack([group.mean(dim=0) for group in groups]), None
        rows = [group.flatten(0, 1) for group in groups]
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), _mask_or_none(mask)

    def encode(self, patches: Tensor, grid: Tensor, input_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """Reference tokens (B, T, C) of a batch of groups, each encoded together."""
        return self._aggregate(self.context(patches, grid, input_ids, padding_mask), padding_mask)

    def context(self, patches: Tensor, grid: Tensor, input_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """Context states (B, S, D) of a batch of groups, without gradients if the body is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stage.body_frozen):
            dtype = self.encoder.embed_tokens.weight.dtype
            mask = _mask_or_none(padding_mask)
            return self.encoder(patches, grid, input_ids, self.image_token, dtype, padding_mask=mask)

    def _aggregate(self, context: Tensor, padding_mask: Tensor) -> Tensor:
        weight = self.aggregator.norm.weight
        return self.aggregator(context.to(weight.device, weight.dtype), _mask_or_none(padding_mask))


def _mask_or_none(mask: Tensor) -> Tensor | None:
    """Drop a mask that masks nothing, because attention is faster without one."""
    return None if mask.all() else mask


def split_references(input_ids: Tensor, image_token: int, references: int) -> list[Tensor]:
    """Split the ids (S,) of a group's input into the same input for each reference."""
    image = input_ids == image_token
    edges = torch.diff(image.int(), prepend=image.new_zeros(1).int(), append=image.new_zeros(1).int())
    # each span includes the <|vision_start|> and <|vision_end|> around it
    starts, ends = (edges == 1).nonzero()[:, 0] - 1, (edges == -1).nonzero()[:, 0] + 1
    if len(starts) != references:
        raise ValueError(
            f"The question contains {len(starts)} references, but the group has {references}: it was "
            "truncated inside them. Raise max_length."
        )
    before, after = input_ids[: starts[0]], input_ids[ends[-1] :]
    return [torch.cat([before, input_ids[start:end], after]) for start, end in zip(starts, ends, strict=True)]


def tensor_name(parameter: str) -> str:
    """Translate a parameter name of TrainableEasyRef to the name of its tensor in Weights."""
    if parameter.startswith(MLLM_LORA_PREFIX):
        return _layer_path(parameter)
    match = re.fullmatch(r"lora\.(.+)/(to_\w+)\.(down|up)\.weight", parameter)
    return _lora_name(match[1].replace("/", "."), match[2], match[3]) if match else parameter


def _lora_name(attention: str, layer: str, side: str) -> str:
    return f"{LORA_PREFIX}{attention}.processor.{layer}_lora.{side}.weight"


def _layer_path(key: str) -> str:
    """Path of a layer from its key in a ModuleDict, whose keys must not contain dots."""
    return key.replace("/", ".")


def _lora_layers(tensors: Mapping[str, Tensor]) -> nn.ModuleDict:
    """Linear layers up(down(x)) of the UNet by `_layer_path` key."""
    lora = nn.ModuleDict()
    for name, down in tensors.items():
        path = name.removeprefix(LORA_PREFIX)
        if match := re.fullmatch(r"(.+)\.processor\.(to_\w+)_lora\.down\.weight", path):
            up = tensors[_lora_name(match[1], match[2], "up")]
            lora[f"{match[1]}.{match[2]}".replace(".", "/")] = _low_rank_layer(down, up)
    return lora


def _mllm_lora_layers(tensors: Mapping[str, Tensor]) -> nn.ModuleDict:
    """Linear layers up(down(x)) of the MLLM's body by `_layer_path` key."""
    lora = nn.ModuleDict()
    for name, down in tensors.items():
        if name.endswith(".down.weight"):
            path = name.removesuffix(".down.weight")
            key = path.removeprefix(MLLM_LORA_PREFIX).replace(".", "/")
            lora[key] = _low_rank_layer(down, tensors[f"{path}.up.weight"])
    return lora


def _low_rank_layer(down: Tensor, up: Tensor) -> nn.Sequential:
    """up(down(x)) with these weights."""
    sides = {"down": down, "up": up}
    linears = {side: nn.Linear(*w.T.shape, bias=False, device="meta") for side, w in sides.items()}
    layer = nn.Sequential(OrderedDict(linears))
    layer.load_state_dict({f"{side}.weight": w for side, w in sides.items()}, assign=True)
    return layer
