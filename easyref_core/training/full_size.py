"""Full-size models without weights: sizes as data, modules on the meta device, cost of a micro-batch."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml

from ..checkpoint.checkpoint import LORA_PREFIX, expected_shapes
from ..mllm.config import EasyRefConfig
from ..mllm.preprocess import SIZE
from ..unet.diffusers_unet import cross_attention_widths
from .base_model import Text
from .batches import Batch
from .counting import Cost, count
from .initial import Weights
from .stages import Stage, group_of
from .trainable import TrainableEasyRef

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from ..unet.layout import Site

SIZES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EASYREF = EasyRefConfig(**SIZES["easyref"])
UNET: dict[str, Any] = SIZES["unet"]
PROMPT_TOKENS = 77
POOLED = 1280  # channels of the second text encoder's projection
IMAGE_SIDE, LATENT_SIDE = 1024, 128  # pixels

IMAGE_TOKENS = (SIZE // (EASYREF.patch_size * EASYREF.merge_size)) ** 2  # 144 for a square reference
OTHER_TOKENS = 60  # assumption: template, instruction and a caption of about ten words
MARKER_TOKENS = 2  # around each image

DTYPE = torch.bfloat16


@cache
def released_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of a full-size EasyRef, under the names of its modules."""
    return expected_shapes(EASYREF, sites())


def unet() -> UNet2DConditionModel:
    """SDXL's UNet, frozen, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**UNET)
    torch.nn.Module.to(model, DTYPE)  # diffusers' own `to` warns of float32 layers, and this model has none
    return model.requires_grad_(False).eval()


@cache
def sites() -> dict[Site, int]:
    """Cross-attention sites of the UNet and their widths."""
    return cross_attention_widths(unet())


def weights(stage: Stage) -> Weights:
    """A full-size EasyRef on the meta device, with a LoRA if the stage trains one."""
    shapes = released_shapes()
    if "lora" not in stage.trains:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(LORA_PREFIX)}
    tensors = {name: torch.empty(shape, dtype=DTYPE, device="meta") for name, shape in shapes.items()}
    return Weights(EASYREF, sites(), tensors, body_is_base=True)


@cache
def parameters() -> dict[str, int]:
    """Number of parameters by parameter group of EasyRef and by model of SDXL."""
    numbers: Counter[str] = Counter()
    for name, shape in released_shapes().items():
        group = "vision tower" if name.startswith("encoder.visual.") else group_of(name)
        numbers[group] += torch.Size(shape).numel()
    return {
        **numbers,
        "unet": _size(unet()),
        "vae": _size(vae()),
        "text encoders": sum(map(_size, text_encoders())),
    }


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def vae() -> torch.nn.Module:
    """SDXL's VAE, float32, on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**SIZES["vae"]).eval()


def text_encoders() -> list[torch.nn.Module]:
    """SDXL's two text encoders on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        return [
            kind(CLIPTextConfig(**sizes, projection_dim=POOLED)).to(DTYPE).eval()
            for kind, sizes in zip(kinds, SIZES["text_encoders"], strict=True)
        ]


def inputs(batch: int, references: int) -> tuple[Tensor, Tensor, Text, Batch]:
    """Inputs of TrainableEasyRef on the meta device, with square references and a square target."""

    def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    side = SIZE // EASYREF.patch_size
    length = context_length(references)
    examples = Batch(
        prompts=("",) * batch,
        time_ids=empty(batch, 6, dtype=torch.float32),
        patches=empty(batch * references * side**2, EASYREF.patch_values, dtype=torch.float32),
        grid=torch.tensor([[1, side, side]] * batch * references),
        references=(references,) * batch,
        input_ids=empty(batch, length, dtype=torch.int64),
        padding_mask=torch.ones(batch, length, dtype=torch.bool),
        seeds=torch.zeros(batch, dtype=torch.int64),
    )
    text = Text(empty(batch, PROMPT_TOKENS, EASYREF.token_width), empty(batch, POOLED))
    return empty(batch, 4, LATENT_SIDE, LATENT_SIDE), empty(batch, dtype=torch.int64), text, examples


def context_length(references: int) -> int:
    """Number of MLLM tokens of a group."""
    return references * (IMAGE_TOKENS + MARKER_TOKENS) + OTHER_TOKENS


class MicroBatchCost(NamedTuple):
    """Cost of one micro-batch on one GPU."""

    step: Cost  # forward and backward of the trained modules and of the UNet
    vae: Cost
    text: Cost
    body: Cost  # forward of the MLLM body alone: part of `step`


@cache
def micro_batch_cost(stage: Stage, batch: int, references: int, checkpointing: bool) -> MicroBatchCost:
    """FLOPs and peak memory of one micro-batch of a stage."""
    model = TrainableEasyRef(
        unet(), weights(stage), stage, 0, gradient_checkpointing=checkpointing, frozen_dtype=DTYPE
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients of weights are not activations
            parameter.register_post_accumulate_grad_hook(_free_gradient)
    noisy, timesteps, text, examples = inputs(batch, references)
    group = examples.patches, examples.grid, examples.input_ids, examples.padding_mask

    step = count(lambda: model(noisy, timesteps, text, examples).float().pow(2).mean().backward())
    with torch.no_grad():
        body = count(lambda: model.context(*group))
    return MicroBatchCost(step, _vae_cost(batch), _text_cost(batch), body)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@cache
def _vae_cost(batch: int) -> Cost:
    model, pixels = vae(), torch.empty(batch, 3, IMAGE_SIDE, IMAGE_SIDE, device="meta")
    with torch.no_grad():
        return count(lambda: model.encode(pixels))


@cache
def _text_cost(batch: int) -> Cost:
    models = text_encoders()
    ids = torch.empty(batch, PROMPT_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad():
        costs = [count(lambda model=model: model(ids, output_hidden_states=True)) for model in models]
    return Cost(sum(cost.flops for cost in costs), max(cost.peak_bytes for cost in costs))
