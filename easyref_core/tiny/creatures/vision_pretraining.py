"""Pretraining of the vision tower: each image token tells the identity of the creature it is on.

A tower that sees identities is the condition of everything after it: averaged or read together, references
cannot show what it does not see.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...mllm.config import EasyRefConfig
from ...mllm.preprocess import patchify
from ...mllm.qwen2_vl import VisionTower
from ..optimizer import Log, OneCycleMuon, Training
from .dataset import Dataset
from .identities import NUMBERS, PARTS, VARIANCE, Floats
from .images import IMAGE_SIZE, Scenes

MUON_LR = 0.02
REACH = 0.9  # a token is on a creature if its centre is within this many radii of the creature's


class VisionRegressor(nn.Module):
    """Images (N, 64, 64, 3), bytes -> for each image token the logit of a creature, and its identity."""

    def __init__(self, config: EasyRefConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config, nn)
        self.head = nn.Linear(config.hidden_size, 1 + NUMBERS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        count, height, width, _ = images.shape
        patch = self.config.patch_size
        grid = torch.tensor([(1, height // patch, width // patch)]).expand(count, -1)
        outputs = self.head(self.tower(patchify(images, self.config), grid)).unflatten(0, (count, -1))
        return outputs[..., 0], outputs[..., 1:]  # (N, T), (N, T, 13)


def label_tokens(scenes: Scenes, side: int) -> tuple[NDArray[np.bool_], Floats]:
    """Label each of side x side image tokens: is it on a creature (N, T), and that creature's identity.

    The nearest creature counts, in its own radii. Identities: (N, T, 13).
    """
    axis = (np.arange(side) + 0.5) * IMAGE_SIZE / side
    centres = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)  # (T, 2), row by row
    away = np.linalg.norm(centres[None, :, None] - scenes.centres[:, None], axis=-1)  # (N, T, M), pixels
    radii = scenes.radii[:, None]
    away = np.divide(away, radii, out=np.full_like(away, np.inf), where=radii > 0)
    nearest = away.argmin(axis=-1)  # (N, T)
    on = np.take_along_axis(away, nearest[..., None], axis=-1)[..., 0] < REACH
    return on, np.take_along_axis(scenes.identities, nearest[..., None], axis=1)


def part_errors(predicted: Tensor, identities: Tensor) -> dict[str, float]:
    """Squared error of each part of identities (N, 13) as a fraction of its variance; 1 knows nothing."""
    errors = ((predicted - identities).square().mean(dim=0) / VARIANCE).split(list(PARTS.values()))
    return {name: part.mean().item() for name, part in zip(PARTS, errors, strict=True)}


def pretrain_vision(dataset: Dataset, config: EasyRefConfig, training: Training, log: Log) -> VisionTower:
    """Train a vision tower on the views, a quarter of each batch on the targets."""
    rng = np.random.default_rng(training.seed)
    torch.manual_seed(training.seed)
    model = VisionRegressor(config)
    optimizer = OneCycleMuon([model], training, MUON_LR)
    side = IMAGE_SIZE // config.pixels_per_token
    targets, views = (
        (images, *map(torch.from_numpy, label_tokens(scenes, side)))
        for images, scenes in (
            (dataset.targets, dataset.target_scenes),
            (dataset.views.reshape(-1, *dataset.views.shape[2:]), dataset.view_scenes),
        )
    )
    for step in range(training.steps):
        images, on, identities = views if step % 4 else targets
        picked = rng.integers(len(images), size=training.batch)
        logits, predicted = model(images[picked])
        covered = on[picked]
        predicted, wanted = predicted[covered], identities[picked][covered]
        presence = binary_cross_entropy_with_logits(logits, covered.float())
        optimizer.step(presence + (predicted - wanted).square().mean() / VARIANCE)
        if training.logs(step, every=251):
            errors = ", ".join(
                f"{name} {error:.3f}" for name, error in part_errors(predicted, wanted).items()
            )
            log(f"vision tower {step}: presence {presence.item():.3f}, identity errors: {errors}")
    return model.tower
