"""Trains an IP-Adapter of any size as its authors do, as a baseline on the same images as EasyRef.

The recipe (arXiv 2308.06721 and its tutorial_train_sdxl.py): an image projection and K/V adapters are
trained, the latter from the UNet's text K/V; UNet, VAE, text encoders and image encoder are frozen. An image
is its own condition. Image, text, or both are dropped with probability 0.05 each. Loss: epsilon MSE, uniform
timesteps; AdamW with a constant learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ...files.atomic_write import atomic_write
from ...training.base_model import BaseModel, Text
from ...training.batches import Batch, Examples
from .clip_pixels import clip_pixels_of
from .finite import require_finite
from .ip_adapter import Adapter, AdapterState, attached, embedding, flatten, image_processors, load_adapter

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LOG_EVERY = 100  # updates
REMEDY = "Lower lr, or set mixed_precision to bf16 or null."
TOKENS = 4  # image tokens of the plain IP-Adapter, the only number that diffusers' loader supports


@dataclass(frozen=True)
class IPAdapterTraining:
    """Hyperparameters of an IP-Adapter training."""

    steps: int  # optimizer updates
    batch: int = 8  # images per process and micro-batch
    lr: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0
    drop: float = 0.05  # probability of each: image alone, text alone, both
    accumulation: int = 1
    mixed_precision: str | None = None


class Draw(NamedTuple):
    """The random values of a batch; each row is drawn from its own seed."""

    noise: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    no_image: Tensor  # (B,) bool
    no_text: Tensor  # (B,) bool


class TrainableIPAdapter(nn.Module):
    """The adapter's parameters; the UNet around them is not registered."""

    def __init__(self, unet: UNet2DConditionModel, adapter: Adapter) -> None:
        super().__init__()
        self.unregistered = (unet, adapter)
        self.projection = adapter.projection
        self.processors = nn.ModuleList(processor for _, processor in image_processors(adapter))

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor, embeds: Tensor
    ) -> Tensor:
        """Noisy latents (B, 4, h, w) and image embeddings (B, 1, D) -> predicted noise (B, 4, h, w)."""
        unet, adapter = self.unregistered
        sizes = {"text_embeds": text.pooled.to(unet.dtype), "time_ids": time_ids}
        noisy, states = noisy.to(unet.dtype), text.states.to(unet.dtype)
        with attached(unet, adapter), embedding(unet, embeds):
            return unet(noisy, timesteps, states, added_cond_kwargs=sizes, return_dict=False)[0]


def train_ip_adapter(
    base: BaseModel,
    image_encoder: nn.Module,
    images: Examples,
    out: Path | str,
    training: IPAdapterTraining,
    log: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train, save to `out` (.safetensors for diffusers' load_ip_adapter), and return each update's loss.

    image_encoder: a CLIPVisionModelWithProjection in float32. images: batches with pixels; their references
    are not used, and texts must not be dropped, because that is done here. The VAE is not run if they have
    latents too. Raises NotFiniteError for a loss or weight that is not finite; then nothing is saved.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        gradient_accumulation_steps=training.accumulation, mixed_precision=training.mixed_precision
    )
    torch.manual_seed(training.seed)
    image_encoder = image_encoder.to(base.device).eval().requires_grad_(False)
    adapter = load_adapter(base.unet, initial_adapter(base.unet, image_encoder.config.projection_dim))
    adapter = Adapter(adapter.processors, adapter.projection.float().requires_grad_(True), adapter.kind)
    model = TrainableIPAdapter(base.unet, adapter).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, world, size = accelerator.process_index, accelerator.num_processes, training.batch
    losses = []
    for step in range(training.steps):
        total = 0.0
        for micro in range(training.accumulation):
            start = ((step * training.accumulation + micro) * world + rank) * size
            batch = images.batch(range(start, start + size))
            with accelerator.accumulate(model):
                loss = _loss(base, image_encoder, model, batch, training.drop)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += accelerator.reduce(loss.detach(), "mean").item() / training.accumulation
        losses.append(total)
        require_finite("the loss", total, f"ip_adapter, step {step}", REMEDY)
        if len(losses) % LOG_EVERY == 0:
            log(f"IP-Adapter {len(losses)}: loss {sum(losses[-LOG_EVERY:]) / LOG_EVERY:.4f}")
    state = adapter_state(adapter)
    require_finite("the trained adapter", state, f"ip_adapter, after {training.steps} steps", REMEDY)
    if accelerator.is_main_process:
        save_adapter(state, Path(out))
    accelerator.wait_for_everyone()
    return losses


def initial_adapter(unet: UNet2DConditionModel, width: int) -> AdapterState:
    """A new adapter for image embeddings of size `width`: a random projection, and the text's K and V."""
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
    """The adapter's weights under the names of IP-Adapter files."""
    (projection,) = adapter.projection.image_projection_layers
    state = projection.state_dict()
    image_proj = {name.replace("image_embeds.", "proj."): tensor for name, tensor in state.items()}
    layers = {}
    for number, processor in image_processors(adapter):
        layers[f"{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach()
        layers[f"{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight.detach()
    return {"image_proj": image_proj, "ip_adapter": layers}


def save_adapter(state: AdapterState, file: Path) -> None:
    """Write an IP-Adapter file atomically."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in flatten(state).items()}, partial)


def draw(seeds: Tensor, shape: Sequence[int], num_timesteps: int, drop: float) -> Draw:
    """Draw each row from its seed (B,): noise of `shape`, a timestep, and whether to drop image and text."""
    noise, timesteps, chances = [], [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(tuple(shape), generator=generator))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        chances.append(torch.rand((), generator=generator))
    chance = torch.stack(chances)
    no_image = (chance < drop) | ((chance >= 2 * drop) & (chance < 3 * drop))
    no_text = (chance >= drop) & (chance < 3 * drop)
    return Draw(torch.stack(noise), torch.stack(timesteps), no_image, no_text)


def _loss(base: BaseModel, encoder: nn.Module, model: nn.Module, batch: Batch, drop: float) -> Tensor:
    if batch.pixels is None:
        raise ValueError(
            "The batch holds latents only; the image encoder needs pixels. Switch precomputed latents off."
        )
    pixels = batch.pixels.to(base.device)
    with torch.no_grad():
        latents = base.encode_images(pixels) if batch.latents is None else batch.latents.to(base.device)
        drawn = draw(batch.seeds, latents.shape[1:], base.schedule.config.num_train_timesteps, drop)
        drawn = Draw(*(tensor.to(base.device) for tensor in drawn))
        embeds = encoder(clip_pixels_of(pixels, encoder.config.image_size)).image_embeds
        embeds = embeds.masked_fill(drawn.no_image[:, None], 0)[:, None]  # -> (B, 1, D)
        dropped = drawn.no_text.tolist()
        prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped, strict=True)]
        text = base.encode_text(prompts)
        noisy = base.schedule.add_noise(latents, drawn.noise, drawn.timesteps)
    predicted = model(noisy, drawn.timesteps, text, batch.time_ids.to(base.device), embeds)
    return torch.nn.functional.mse_loss(predicted.float(), drawn.noise)
