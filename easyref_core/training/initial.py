"""Initial weights of a run: from the base MLLM and the UNet, or from a checkpoint of an earlier stage."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint.checkpoint import (
    LORA_PREFIX,
    PATCH_EMBED,
    lora_shapes,
    mllm_sources,
    open_checkpoint,
    read_config,
)
from ..files.tensor_files import read_sources
from ..mllm.config import EasyRefConfig
from ..unet.diffusers_unet import cross_attention_widths
from ..unet.layout import Site, require_fit
from .stages import Stage, group_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

MLLM_LORA_PREFIX = "mllm_lora."  # of the LoRA of the MLLM's body, which no checkpoint holds
REFERENCE_TOKENS_STD = 0.1  # the authors' 0.1 * randn


@dataclasses.dataclass(frozen=True)
class Weights:
    """Complete weights: sizes, UNet sites, and every tensor under the names of easyref_core's modules."""

    config: EasyRefConfig
    widths: Mapping[Site, int]  # of the UNet's cross-attentions, in processor order
    tensors: dict[str, Tensor]  # encoder.*, aggregator.*, kv.*, unet.<path>.processor.to_q_lora.down.weight
    body_is_base: bool  # True if encoder.* is the base MLLM's, so a checkpoint may omit it

    def trained(self, stage: Stage) -> dict[str, Tensor]:
        """The tensors that a stage trains; with a LoRA of the MLLM, the body's own are frozen."""
        has_lora = any(name.startswith(MLLM_LORA_PREFIX) for name in self.tensors)
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if group_of(name) in stage.trains and not (has_lora and name.startswith("encoder."))
        }

    @property
    def sites(self) -> tuple[Site, ...]:
        """The cross-attention sites of the UNet, in processor order."""
        return tuple(self.widths)


def from_base(
    mllm: Path,
    unet: UNet2DConditionModel,
    *,
    num_tokens: int = 64,
    final_layers: int = 1,
    lora_rank: int = 0,
    causal: bool = True,
    seed: int = 0,
) -> Weights:
    """Weights of an untrained model.

    The MLLM's last `final_layers` layers become the final layers, with a copy of its norm. K and V are copies
    of the UNet's text K and V. The reference tokens, the projector and the LoRA are drawn from `seed`.
    """
    settings = read_config(mllm)
    widths = cross_attention_widths(unet)
    generator = torch.Generator().manual_seed(seed)
    tensors = _split(_mllm_tensors(mllm), final_layers)
    hidden = tensors["encoder.embed_tokens.weight"].shape[1]
    tensors["aggregator.reference_tokens.weight"] = REFERENCE_TOKENS_STD * torch.randn(
        num_tokens, hidden, generator=generator
    )
    tensors |= _projector(hidden, unet.config.cross_attention_dim, seed)
    tensors |= _text_kv(unet, widths)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = EasyRefConfig.from_checkpoint(shapes, settings, {"causal": causal})
    config = dataclasses.replace(config, lora_rank=lora_rank)
    tensors |= fresh_lora(config, widths, generator)
    return Weights(config, widths, tensors, body_is_base=True)


def from_checkpoint(
    path: Path, mllm: Path, unet: UNet2DConditionModel, *, lora_rank: int = 0, seed: int = 0
) -> Weights:
    """Weights of an earlier stage. A missing body comes from `mllm`, a missing LoRA is initialized.

    Raises ValueError for a checkpoint of another UNet or with another LoRA rank.
    """
    checkpoint = open_checkpoint(path, mllm)
    require_fit("The base model's UNet", cross_attention_widths(unet), checkpoint.widths)
    config, rank = checkpoint.config, checkpoint.config.lora_rank
    if rank and lora_rank not in (0, rank):
        raise ValueError(
            f"{path} has a LoRA of rank {rank}, but the settings have lora_rank {lora_rank}. "
            f"Set lora_rank: {rank}."
        )
    lora = {LORA_PREFIX + name: _float32_copy(name, tensor) for name, tensor in checkpoint.lora().items()}
    tensors, widths = checkpoint.state(_float32_copy) | lora, checkpoint.widths
    if lora_rank and not rank:
        config = dataclasses.replace(config, lora_rank=lora_rank)
        tensors |= fresh_lora(config, widths, torch.Generator().manual_seed(seed))
    body = checkpoint.sources["encoder.embed_tokens.weight"].file.path
    return Weights(config, widths, tensors, body_is_base=body != path)


def fresh_lora(
    config: EasyRefConfig, widths: Mapping[Site, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """LoRA without effect: down is drawn with standard deviation 1 / rank, up is zero."""
    return _without_effect(lora_shapes(config, widths), config.lora_rank, generator)


def _without_effect(
    shapes: Mapping[str, tuple[int, ...]], rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=generator) / rank if ".down." in name else torch.zeros(shape)
        for name, shape in shapes.items()
    }


def mllm_lora_shapes(tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of a LoRA of every linear layer in the blocks of the MLLM's decoder and vision tower."""
    shapes = {}
    for name, weight in tensors.items():
        match = re.fullmatch(r"encoder\.((?:layers|visual\.blocks)\..+)\.weight", name)
        if match and weight.ndim == 2:
            rows, columns = weight.shape
            shapes[f"{MLLM_LORA_PREFIX}{match[1]}.down.weight"] = (rank, columns)
            shapes[f"{MLLM_LORA_PREFIX}{match[1]}.up.weight"] = (rows, rank)
    return shapes


def fresh_mllm_lora(tensors: Mapping[str, Tensor], rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA of the MLLM without effect, drawn as `fresh_lora`."""
    generator = torch.Generator().manual_seed(seed)
    return _without_effect(mllm_lora_shapes(tensors, rank), rank, generator)


def merge_mllm_lora(tensors: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The body's tensors, encoder.*, with the products of a LoRA added, in float32."""
    merged = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    for name, down in lora.items():
        if name.endswith(".down.weight"):
            path = name.removeprefix(MLLM_LORA_PREFIX).removesuffix(".down.weight")
            up = lora[f"{MLLM_LORA_PREFIX}{path}.up.weight"]
            weight = merged[f"encoder.{path}.weight"]
            merged[f"encoder.{path}.weight"] = weight.float() + (up.float() @ down.float()).to(weight.device)
    return merged


def _float32_copy(_: str, tensor: Tensor) -> Tensor:
    """Copy, because training writes into the tensor and must not touch the memory-mapped file."""
    return tensor.to(torch.float32, copy=True)


def _mllm_tensors(mllm: Path) -> dict[str, Tensor]:
    tensors = {name: _float32_copy(name, tensor) for name, tensor in read_sources(mllm_sources(mllm))}
    return tensors | {PATCH_EMBED: tensors[PATCH_EMBED].flatten(1)}


def _split(tensors: dict[str, Tensor], final_layers: int) -> dict[str, Tensor]:
    """Move the MLLM's last layers and a copy of its norm from the encoder to the aggregator."""
    layer = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
    count = 1 + max(int(match[1]) for name in tensors if (match := layer.match(name)))
    if not 0 < final_layers < count:
        raise ValueError(
            f"final_layers is {final_layers}, but the MLLM has {count} layers. "
            f"Set final_layers to 1 to {count - 1}."
        )
    body = count - final_layers
    new = {"aggregator.norm.weight": tensors["encoder.norm.weight"].clone()}
    for name, tensor in tensors.items():
        match = layer.match(name)
        if match and int(match[1]) >= body:
            name = f"aggregator.layers.{int(match[1]) - body}.{match[2]}"
        new[name] = tensor
    return new


def _projector(hidden: int, token_width: int, seed: int) -> dict[str, Tensor]:
    """Projector (Linear, GELU, Linear, LayerNorm) with torch's default initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linears = nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, token_width)
        projector = nn.Sequential(*linears, nn.LayerNorm(token_width))
    return {f"aggregator.projector.{name}": tensor for name, tensor in projector.state_dict().items()}


def _text_kv(unet: UNet2DConditionModel, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Copy the UNet's text K and V as initial K and V of the reference tokens."""
    tensors = {}
    for number, site in enumerate(sites):
        for side in "kv":
            weight = unet.get_submodule(f"{site.diffusers}.attn2.to_{side}").weight.detach()
            tensors[f"kv.to_{side}_ip.{number}.weight"] = weight.to("cpu", torch.float32, copy=True)
    return tensors
