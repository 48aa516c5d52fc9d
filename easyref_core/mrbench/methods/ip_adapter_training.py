"""Trains an IP-Adapter as its authors do, at any size: the baseline's own training, on the pictures EasyRef gets too.

The recipe (arXiv 2308.06721 and its tutorial_train_sdxl.py): an image projection and K/V adapters learn, the latter from
the UNet's text K/V on; UNet, VAE, text encoders and image encoder are frozen. A picture is its own condition. Image, text
or both are dropped, each at 0.05. Loss: plain epsilon MSE, uniform timesteps; AdamW, constant rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import nn

from ...files.atomic_write import atomic_write
from .clip_pixels import clip_pixels_of
from .ip_adapter import Adapter, AdapterState, attached, embedding, image_processors, load_adapter

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from easyref_core.training.base_model import BaseModel, Text
    from easyref_core.training.batches import Batch

TOKENS = 4  # image tokens of the plain IP-Adapter; diffusers' loader knows no other number
DROP = 0.05  # each: image alone, text alone, both


class Pictures(Protocol):
    """What it trains on: any training.batches.Examples whose batches hold pixels. Their references go unread.

    Latents beside the pixels are taken as they are, so the VAE need not run.
    """

    def batch(self, positions: Sequence[int]) -> Batch: ...


class Drawn(NamedTuple):
    """A batch after everything random was drawn, every row from its own seed."""

    noise: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    no_image: Tensor  # (B,) bool
    no_text: Tensor  # (B,) bool


class TrainableIPAdapter(nn.Module):
    """The adapter's parameters, inside a UNet that is held unregistered."""

    def __init__(self, unet: UNet2DConditionModel, adapter: Adapter) -> None:
        super().__init__()
        self._unregistered = (unet, adapter)
        self.projection = adapter.projection
        self.processors = nn.ModuleList(processor for _, processor in image_processors(adapter))

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor, embeds: Tensor
    ) -> Tensor:
        """Noisy latents (B, 4, h, w) and image embeddings (B, 1, D) -> the noise predicted in them (B, 4, h, w)."""
        unet, adapter = self._unregistered
        dtype = unet.dtype
        sizes = {"text_embeds": text.pooled.to(dtype), "time_ids": time_ids}
        with attached(unet, adapter), embedding(unet, embeds):
            return unet(
                noisy.to(dtype), timesteps, text.states.to(dtype), added_cond_kwargs=sizes, return_dict=False
            )[0]


def train_ip_adapter(
    base: BaseModel,
    image_encoder: nn.Module,
    pictures: Pictures,
    out: Path | str,
    steps: int,
    batch: int = 8,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    seed: int = 0,
    drop: float = DROP,
    accumulation: int = 1,
    mixed_precision: str | None = None,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train and save as `out` (.safetensors, what diffusers' load_ip_adapter reads). The loss of every update comes back.

    image_encoder: a CLIPVisionModelWithProjection, in float32. steps: optimizer updates; batch: pictures a process and micro-batch.
    pictures: must drop no text of their own, or it is dropped twice.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    torch.manual_seed(seed)
    image_encoder = image_encoder.to(base.device).eval().requires_grad_(False)
    adapter = load_adapter(base.unet, initial_adapter(base.unet, image_encoder.config.projection_dim))
    adapter = Adapter(adapter.processors, adapter.projection.float().requires_grad_(True), adapter.kind)
    model = TrainableIPAdapter(base.unet, adapter).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in range(accumulation):
            start = ((step * accumulation + micro) * world + rank) * batch
            with accelerator.accumulate(model):
                loss = _loss(base, image_encoder, model, pictures.batch(range(start, start + batch)), drop)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += accelerator.reduce(loss.detach(), "mean").item() / accumulation
        losses.append(total)
        log(step, total)
    if accelerator.is_main_process:
        save_adapter(adapter_state(adapter), Path(out))
    accelerator.wait_for_everyone()
    return losses


def initial_adapter(unet: UNet2DConditionModel, width: int) -> AdapterState:
    """A new adapter for image embeddings `width` wide: a random projection, K and V those of the text."""
    context = unet.config.cross_attention_dim
    project, norm = nn.Linear(width, TOKENS * context), nn.LayerNorm(context)
    projection = {f"proj.{name}": t.detach() for name, t in project.named_parameters()}
    projection |= {f"norm.{name}": t.detach() for name, t in norm.named_parameters()}
    layers = {}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(names):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        layers[f"{2 * i + 1}.to_k_ip.weight"] = attention.to_k.weight.detach().float().clone()
        layers[f"{2 * i + 1}.to_v_ip.weight"] = attention.to_v.weight.detach().float().clone()
    return {"image_proj": projection, "ip_adapter": layers}


def adapter_state(adapter: Adapter) -> AdapterState:
    """The adapter's weights under the names that IP-Adapter files have."""
    (projection,) = adapter.projection.image_projection_layers
    names = {"image_embeds": "proj", "norm": "norm"}  # diffusers' name: the file's
    image_proj = {}
    for name, tensor in projection.state_dict().items():
        part, _, rest = name.partition(".")
        image_proj[f"{names[part]}.{rest}"] = tensor
    layers = {}
    for number, processor in image_processors(adapter):
        layers[f"{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach()
        layers[f"{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight.detach()
    return {"image_proj": image_proj, "ip_adapter": layers}


def save_adapter(state: AdapterState, file: Path) -> None:
    """Write an IP-Adapter file, whole or not at all."""
    from safetensors.torch import save_file

    flat = {
        f"{part}.{name}": t.cpu().contiguous()
        for part, tensors in state.items()
        for name, t in tensors.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        save_file(flat, partial)


def draw(seeds: Tensor, shape: Sequence[int], last: int, drop: float) -> Drawn:
    """Noise of `shape`, a timestep below `last` and what is dropped, for every row from its seed (B,)."""
    noise, timesteps, chances = [], [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(tuple(shape), generator=generator))
        timesteps.append(torch.randint(last, (), generator=generator))
        chances.append(torch.rand((), generator=generator))
    chance = torch.stack(chances)
    no_image = (chance < drop) | ((chance >= 2 * drop) & (chance < 3 * drop))
    no_text = (chance >= drop) & (chance < 3 * drop)
    return Drawn(torch.stack(noise), torch.stack(timesteps), no_image, no_text)


def _loss(base: BaseModel, encoder: nn.Module, model: nn.Module, batch: Batch, drop: float) -> Tensor:
    if batch.pixels is None:
        raise ValueError(
            "The batch holds latents only; the image encoder needs pixels. Switch precomputed latents off."
        )
    pixels = batch.pixels.to(base.device)
    with torch.no_grad():
        latents = base.encode_images(pixels) if batch.latents is None else batch.latents.to(base.device)
        drawn = Drawn(
            *(
                t.to(base.device)
                for t in draw(batch.seeds, latents.shape[1:], base.schedule.config.num_train_timesteps, drop)
            )
        )
        embeds = encoder(clip_pixels_of(pixels, encoder.config.image_size)).image_embeds
        embeds = embeds.masked_fill(drawn.no_image[:, None], 0)[:, None]  # -> (B, 1, D)
        prompts = [
            "" if gone else prompt for prompt, gone in zip(batch.prompts, drawn.no_text.tolist(), strict=True)
        ]
        text = base.encode_text(prompts)
        noisy = base.schedule.add_noise(latents, drawn.noise, drawn.timesteps)
    answer = model(noisy, drawn.timesteps, text, batch.time_ids.to(base.device), embeds)
    return torch.nn.functional.mse_loss(answer.float(), drawn.noise)
