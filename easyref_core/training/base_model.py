"""The frozen half: a diffusers SDXL folder's UNet, VAE, text encoders and noise schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class Text(NamedTuple):
    """What SDXL's text encoders say of a batch of prompts."""

    states: Tensor  # (B, N, C), the last but one hidden states of both, side by side
    pooled: Tensor  # (B, P), the second encoder's projection

    @classmethod
    def cat(cls, texts: Sequence[Text]) -> Text:
        return cls(*(torch.cat(parts) for parts in zip(*texts, strict=True)))


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """An SDXL model as training and painting use it. Nothing in it has gradients of its own."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL  # float32 always: SDXL's overflows in float16
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    schedule: DDPMScheduler
    device: torch.device

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> BaseModel:
        """Load the folder of a diffusers StableDiffusionXLPipeline."""
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        folder, device = Path(folder), torch.device(device)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no model_index.json: it is not a diffusers SDXL folder. Wanted one with unet/, vae/, "
                "text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and scheduler/, as "
                "stabilityai/stable-diffusion-xl-base-1.0 has them."
            )

        def frozen(kind: type, part: str, dtype: torch.dtype) -> torch.nn.Module:
            model = kind.from_pretrained(
                str(folder), subfolder=part, torch_dtype=dtype, local_files_only=True
            )
            return model.to(device).requires_grad_(False).eval()

        def offline(kind: type, part: str) -> object:
            return kind.from_pretrained(str(folder), subfolder=part, local_files_only=True)

        unet = frozen(UNet2DConditionModel, "unet", dtype)
        return cls(
            unet=unet.to(memory_format=torch.channels_last),
            vae=frozen(AutoencoderKL, "vae", torch.float32),
            text_encoder=frozen(CLIPTextModel, "text_encoder", dtype),
            text_encoder_2=frozen(CLIPTextModelWithProjection, "text_encoder_2", dtype),
            # Auto: the class its config names. CLIPTokenizer would read the tiny model's words as bytes and unknowns.
            tokenizer=offline(AutoTokenizer, "tokenizer"),
            tokenizer_2=offline(AutoTokenizer, "tokenizer_2"),
            schedule=offline(DDPMScheduler, "scheduler"),
            device=device,
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent: 8."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """What the UNet reads of the prompts; each is cut to what the text encoders have room for."""
        states = []
        for tokenizer, encoder in (
            (self.tokenizer, self.text_encoder),
            (self.tokenizer_2, self.text_encoder_2),
        ):
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
        """pixels (B, 3, H, W) in -1..1 -> mean and deviation of their latents (B, 4, H / 8, W / 8), scaled, float32."""
        with torch.autocast(self.device.type, enabled=False):
            distribution = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        factor = self.vae.config.scaling_factor
        return distribution.mean * factor, distribution.std * factor

    def encode_pictures(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """pixels (B, 3, H, W) in -1..1 -> latents (B, 4, H / 8, W / 8), scaled, float32.

        noise: a standard normal draw of the latents' shape gives a draw from the VAE's distribution, as training takes
        it; None its mean.
        """
        mean, deviation = self.latent_moments(pixels)
        return mean if noise is None else mean + deviation * noise.to(mean.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 4, h, w) -> pictures (B, 3, 8 h, 8 w) in 0..1, float32."""
        with torch.autocast(self.device.type, enabled=False):
            latents = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
            return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def time_ids(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int], batch: int = 1
    ) -> Tensor:
        """SDXL's conditioning on sizes (batch, 6): original height, width, crop top, left, target height, width."""
        return torch.tensor([[*original, *crop, *target]], dtype=torch.float32, device=self.device).expand(
            batch, -1
        )
