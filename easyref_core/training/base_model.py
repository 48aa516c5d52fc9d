"""The frozen base model: an SDXL model's UNet, VAE, text encoders and noise schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from .base_files import MODELS, load_parts
from .objective import require_known

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Size = tuple[int, int]


class Text(NamedTuple):
    """Text conditioning of a batch of prompts."""

    states: Tensor  # (B, N, C): penultimate hidden states of both text encoders, concatenated
    pooled: Tensor  # (B, P): projection of the second encoder

    @classmethod
    def cat(cls, texts: Sequence[Text]) -> Text:
        return cls(*(torch.cat(parts) for parts in zip(*texts, strict=True)))


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """An SDXL model for training and sampling. None of its parameters requires a gradient."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL  # float32 always, because SDXL's overflows in float16
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    schedule: DDPMScheduler
    device: torch.device
    parked: tuple[str, ...] = ()  # models that stay in main memory except in `resident`

    MODELS: ClassVar[tuple[str, ...]] = MODELS

    @classmethod
    def load(
        cls,
        base: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        parked: Iterable[str] = (),
        *,
        config: Path | None = None,
    ) -> BaseModel:
        """Load a diffusers SDXL folder, or a single-file checkpoint; all but the VAE in `dtype`.

        parked: names of MODELS that are not put on `device`. config: see base_files.load_parts, which raises
        FileNotFoundError or ValueError. ValueError also for an unknown prediction type.
        """
        device, parked = torch.device(device), tuple(parked)
        parts = load_parts(Path(base), config, dtype)
        require_known(parts["schedule"])
        for name in MODELS:
            parts[name].to("cpu" if name in parked else device).requires_grad_(False).eval()
        parts["unet"].to(memory_format=torch.channels_last)
        return cls(**parts, device=device, parked=parked)

    @contextmanager
    def resident(self, *names: str) -> Iterator[None]:
        """Put parked models on the device, and back into main memory at the end."""
        models = [getattr(self, name) for name in names if name in self.parked]
        try:
            for model in models:
                model.to(self.device)
            yield
        finally:
            for model in models:
                model.to("cpu")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along one side of a latent: 8."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Text conditioning of the prompts, each truncated to the length of the text encoders."""
        states = []
        encoders = (self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)
        for tokenizer, encoder in encoders:
            ids = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return Text(torch.cat(states, dim=-1), output.text_embeds)

    @torch.no_grad()
    def latent_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, both (B, 4, H / 8, W / 8) float32.

        pixels: (B, 3, H, W) in -1..1.
        """
        with torch.autocast(self.device.type, enabled=False):
            distribution = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        factor = self.vae.config.scaling_factor
        return distribution.mean * factor, distribution.std * factor

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Mean of the scaled latents, (B, 4, H / 8, W / 8) float32, of pixels (B, 3, H, W) in -1..1."""
        return self.latent_moments(pixels)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, 4, h, w) into images (B, 3, 8 h, 8 w) in 0..1, float32."""
        with torch.autocast(self.device.type, enabled=False):
            latents = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
            return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def time_ids(self, original: Size, crop: Size, target: Size, batch: int = 1) -> Tensor:
        """SDXL's conditioning (batch, 6): original height, width, crop top, left, target height, width."""
        sizes = torch.tensor([[*original, *crop, *target]], dtype=torch.float32, device=self.device)
        return sizes.expand(batch, -1)
