"""Full-size models without weights: sizes as data, modules on the meta device, cost of a micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .initial import Weights, mllm_lora_shapes
from .stages import Stage, group_of
from .trainable import TrainableEasyRef

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from ..unet.layout import Site

PROMPT_TOKENS = 77
IMAGE_SIDE, LATENT_SIDE = 1024, 128  # pixels
OTHER_TOKENS = 60  # assumption: template, instruction and a caption of about ten words
MARKER_TOKENS = 2  # around each image

DTYPE = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Sizes:
    """Sizes of an EasyRef and of its base, from which both are built without weights."""

    easyref: EasyRefConfig
    unet: Mapping[str, Any]  # config.json of diffusers
    vae: Mapping[str, Any]
    text_encoders: Sequence[Mapping[str, Any]] = ()  # only for FLOPs
    pooled: int = 1280  # channels of the second text encoder's projection

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


FULL_SIZE = Sizes(
    **{
        name: EasyRefConfig(**sizes) if name == "easyref" else sizes
        for name, sizes in yaml.safe_load(
            Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
        ).items()
    }
)
EASYREF = FULL_SIZE.easyref
IMAGE_TOKENS = (SIZE // (EASYREF.patch_size * EASYREF.merge_size)) ** 2  # 144 for a square reference


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One micro-batch on one GPU, and the levers that change its cost."""

    stage: Stage
    batch: int
    references: int
    checkpointing: bool
    mllm_lora_rank: int = 0
    precomputed: frozenset[str] = frozenset()  # of precomputed.PARTS
    side: int = IMAGE_SIDE  # pixels of a target
    size: int = SIZE  # pixels of a reference


@cache
def released_shapes(sizes: Sizes = FULL_SIZE) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of an EasyRef, under the names of its modules."""
    return expected_shapes(sizes.easyref, sites(sizes))


def unet(sizes: Sizes = FULL_SIZE) -> UNet2DConditionModel:
    """SDXL's UNet, frozen, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(sizes.unet)
    torch.nn.Module.to(model, DTYPE)  # diffusers' own `to` warns of float32 layers, and this model has none
    return model.requires_grad_(False).eval()


@cache
def sites(sizes: Sizes = FULL_SIZE) -> dict[Site, int]:
    """Cross-attention sites of the UNet and their widths."""
    return cross_attention_widths(unet(sizes))


def weights(stage: Stage, sizes: Sizes = FULL_SIZE, mllm_lora_rank: int = 0) -> Weights:
    """An EasyRef on the meta device, with a LoRA if the stage trains one."""
    shapes = released_shapes(sizes)
    if "lora" not in stage.trains:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(LORA_PREFIX)}
    tensors = {name: torch.empty(shape, dtype=DTYPE, device="meta") for name, shape in shapes.items()}
    if mllm_lora_rank:
        lora = mllm_lora_shapes(tensors, mllm_lora_rank)
        tensors |= {name: torch.empty(shape, dtype=DTYPE, device="meta") for name, shape in lora.items()}
    return Weights(sizes.easyref, sites(sizes), tensors, body_is_base=True)


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


def vae(sizes: Sizes = FULL_SIZE) -> torch.nn.Module:
    """SDXL's VAE, float32, on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(sizes.vae).eval()


def text_encoders() -> list[torch.nn.Module]:
    """SDXL's two text encoders on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        return [
            kind(CLIPTextConfig(**sizes, projection_dim=FULL_SIZE.pooled)).to(DTYPE).eval()
            for kind, sizes in zip(kinds, FULL_SIZE.text_encoders, strict=True)
        ]


def inputs(workload: Workload, sizes: Sizes = FULL_SIZE) -> tuple[Tensor, Tensor, Text, Batch]:
    """Inputs of TrainableEasyRef on the meta device, with square references and a square target."""

    def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    config, batch, references = sizes.easyref, workload.batch, workload.references
    stride = config.patch_size * config.merge_size
    side = workload.size // stride * config.merge_size  # patches
    length = context_length(references, (side // config.merge_size) ** 2)
    context = empty(batch, length, config.hidden_size) if "contexts" in workload.precomputed else None
    examples = Batch(
        prompts=("",) * batch,
        time_ids=empty(batch, 6, dtype=torch.float32),
        patches=empty(batch * references * side**2, config.patch_values, dtype=torch.float32),
        grid=torch.tensor([[1, side, side]] * batch * references),
        references=(references,) * batch,
        input_ids=empty(batch, length, dtype=torch.int64),
        padding_mask=torch.ones(batch, length, dtype=torch.bool),
        seeds=torch.zeros(batch, dtype=torch.int64),
        context=context,
    )
    text = Text(empty(batch, PROMPT_TOKENS, config.token_width), empty(batch, sizes.pooled))
    latent = workload.side // sizes.vae_scale_factor
    noisy = empty(batch, sizes.vae.get("latent_channels", 4), latent, latent)
    return noisy, empty(batch, dtype=torch.int64), text, examples


def context_length(references: int, image_tokens: int = IMAGE_TOKENS) -> int:
    """Number of MLLM tokens of a group."""
    return references * (image_tokens + MARKER_TOKENS) + OTHER_TOKENS


class MicroBatchCost(NamedTuple):
    """Cost of one micro-batch on one GPU."""

    step: Cost  # forward and backward of the trained modules and of the UNet
    vae: Cost
    text: Cost
    body: Cost  # forward of the MLLM body alone: part of `step`


@cache
def micro_batch_cost(workload: Workload) -> MicroBatchCost:
    """FLOPs and peak memory of one micro-batch of a stage at full size."""
    group = inputs(workload)[3]
    model = _trainable(workload)
    with torch.no_grad():
        body = count(lambda: model.context(group.patches, group.grid, group.input_ids, group.padding_mask))
    return MicroBatchCost(
        step_cost(workload), vae_cost(workload.batch, workload.side), _text_cost(workload.batch), body
    )


def step_cost(workload: Workload, sizes: Sizes = FULL_SIZE) -> Cost:
    """FLOPs and peak memory of forward and backward of the trained modules and of the UNet."""
    model = _trainable(workload, sizes)
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients of weights are not activations
            parameter.register_post_accumulate_grad_hook(_free_gradient)
    noisy, timesteps, text, examples = inputs(workload, sizes)
    return count(
        lambda: model(noisy, timesteps, text, examples, examples.context).float().pow(2).mean().backward()
    )


def _trainable(workload: Workload, sizes: Sizes = FULL_SIZE) -> TrainableEasyRef:
    options = {"gradient_checkpointing": workload.checkpointing, "frozen_dtype": DTYPE}
    parts = weights(workload.stage, sizes, workload.mllm_lora_rank)
    return TrainableEasyRef(unet(sizes), parts, workload.stage, 0, **options)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@cache
def vae_cost(batch: int, side: int = IMAGE_SIDE, sizes: Sizes = FULL_SIZE) -> Cost:
    """FLOPs and peak memory of encoding targets of side x side pixels."""
    model, pixels = vae(sizes), torch.empty(batch, 3, side, side, device="meta")
    with torch.no_grad():
        return count(lambda: model.encode(pixels))


@cache
def _text_cost(batch: int) -> Cost:
    models = text_encoders()
    ids = torch.empty(batch, PROMPT_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad():
        costs = [count(lambda model=model: model(ids, output_hidden_states=True)) for model in models]
    return Cost(sum(cost.flops for cost in costs), max(cost.peak_bytes for cost in costs))
