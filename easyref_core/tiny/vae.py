"""The tiny AutoencoderKL: 64 x 64 pixels <-> latents (12, 8, 8), the principal components of patches.

Latents that a VAE chooses alone have unit variance in every channel, and most channels hold detail that no
condition predicts: an identity of a creature explains 12 % of the variance that ground and place leave, and a
UNet hardly learns to use it. Of principal components it explains 34 %: the first ones are colours, in which
SDXL's latents are nearly linear too, and the variances of the others fall off.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss, pixel_unshuffle

from .optimizer import Log, OneCycleMuon, Training

CONFIG = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PATCH = 8  # pixels of an image along a side of a latent
KL_WEIGHT = 1e-4
LATENT_WEIGHT = 1.0  # of the squared error of the latents against the principal components
EDGE_WEIGHT = 1.0  # of the error of differences between neighbouring pixels; without it, outlines stay soft
MUON_LR = 0.02
INITIAL_LOG_VARIANCE = -6.0  # of the latents; at 0, noise hides the image for hundreds of steps
CROP = 32  # pixels; training is mostly on crops, four of which cost as much as an image
OFFSETS = torch.tensor([0, 8, 8, 16, 16, 24, 24, 32])  # of a crop; borders show little but ground
FULL_IMAGES = 0.2  # last fraction of the training, on images without crops


def principal_components(pixels: Tensor, count: int = CONFIG["latent_channels"]) -> Tensor:
    """First principal components (C, 3, 8, 8) of the patches of images (M, 3, 64, 64).

    They are scaled by one factor, with which the coefficients have unit mean square.
    """
    patches = pixel_unshuffle(pixels, PATCH).movedim(1, -1).flatten(0, 2)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    basis = vectors[:, -count:].T.flip(0) / values[-count:].mean().sqrt()
    return basis.reshape(count, -1, PATCH, PATCH)


def project(pixels: Tensor, basis: Tensor) -> Tensor:
    """Coefficients (N, C, H/8, W/8) of the patches of images (N, 3, H, W) in a basis (C, 3, 8, 8)."""
    return conv2d(pixels, basis, stride=PATCH)


def pretrain_vae(pixels: Tensor, basis: Tensor, folder: Path, training: Training, log: Log) -> None:
    """Train on images (M, 3, 64, 64) in -1..1 and save; `scaling_factor` gives latents of unit deviation.

    basis: of the latents, see `project`.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(training.seed)
    vae = AutoencoderKL(**CONFIG | {"latent_channels": len(basis)}).train()
    nn.init.constant_(vae.quant_conv.bias[len(basis) :], INITIAL_LOG_VARIANCE)
    optimizer = OneCycleMuon([vae], training, MUON_LR)
    for step in range(training.steps):
        if step < (1 - FULL_IMAGES) * training.steps:
            inputs = draw_crops(pixels, training.batch)
        else:
            inputs = _images(pixels, training.batch // 4)
        posterior = vae.encode(inputs).latent_dist
        outputs = vae.decode(posterior.sample()).sample
        error, edges = (outputs - inputs).abs().mean(), edge_error(outputs, inputs)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        away = mse_loss(posterior.mean, project(inputs, basis))
        optimizer.step(error + EDGE_WEIGHT * edges + KL_WEIGHT * kl + LATENT_WEIGHT * away)
        if training.logs(step):
            values = {"L1": error, "edges": edges, "KL": kl, "latents": away}
            log(f"VAE {step}: " + ", ".join(f"{name} {value.item():.4f}" for name, value in values.items()))
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels[:1024].split(128)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.half().save_pretrained(folder)


@torch.no_grad()
def reconstruct(folder: Path, pixels: Tensor) -> Tensor:
    """Encode and decode images (N, 3, 64, 64) in -1..1 with the VAE in a folder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(256)]
    return torch.cat(parts).clamp(-1, 1)


def edge_error(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Mean absolute error of horizontal plus that of vertical differences, of images (N, 3, H, W)."""
    return sum((outputs.diff(dim=dim) - inputs.diff(dim=dim)).abs().mean() for dim in (2, 3))


def _images(pixels: Tensor, count: int) -> Tensor:
    return pixels[torch.randint(len(pixels), (count,))]


def draw_crops(pixels: Tensor, count: int) -> Tensor:
    """Draw crops (count, 3, 32, 32) that are aligned with the latent grid, as the textures are."""
    tops, lefts = OFFSETS[torch.randint(len(OFFSETS), (2, count))].tolist()
    places = zip(_images(pixels, count), tops, lefts, strict=True)
    return torch.stack([image[:, top : top + CROP, left : left + CROP] for image, top, left in places])
