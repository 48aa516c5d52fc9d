"""A small CNN that measures the creature of an image: its identity, its ground and its place.

It judges the images that methods generate; no method sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...files.atomic_write import atomic_write
from ..classifier import to_tensor
from ..optimizer import Log, OneCycleAdamW, Training
from ..worlds import CREATURES
from .captions import GROUND_NAMES, PLACE_NAMES
from .identities import NUMBERS, VARIANCE, Floats, draw_identities
from .images import alone, render
from .vision_pretraining import part_errors

FILE = CREATURES.weights / CREATURES.judge
CHANNELS = (3, 24, 48, 64, 96)
NARROW, FEATURES = 32, 128  # channels of the last 4 x 4 grid, and features computed from it
OUTPUTS = (NUMBERS, len(GROUND_NAMES), len(PLACE_NAMES))
RECONSTRUCTED = 3000  # training images that the VAE encodes and decodes
RECONSTRUCTED_RATE = 0.25  # their share of a batch
TESTED = 2048  # new images for the reported errors


class Judge(nn.Module):
    """Images (N, 3, 64, 64) in -1..1 -> identities (N, 13), logits of ground (N, 6) and place (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(CHANNELS, CHANNELS[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(CHANNELS[-1], NARROW, 1), nn.ReLU(), nn.Flatten()]
        self.features = nn.Sequential(*layers, nn.Linear(16 * NARROW, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, sum(OUTPUTS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.features(images)).split(OUTPUTS, dim=1)


class CreatureJudge:
    """The judge of a file; `identity` names its weights."""

    def __init__(self, file: Path = FILE) -> None:
        from safetensors.torch import load_file

        self.model = Judge()
        self.model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        self.model.eval()
        self.identity = f"{Path(__file__).stem} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Identities (N, 13) of the creatures in images."""
        return self.model(_pixels(images))[0].numpy()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> dict[str, list[str]]:
        """{"ground": [...], "place": [...]} of the images."""
        _, ground, place = self.model(_pixels(images))
        return {
            "ground": [GROUND_NAMES[i] for i in ground.argmax(dim=1).tolist()],
            "place": [PLACE_NAMES[i] for i in place.argmax(dim=1).tolist()],
        }


def load_judge(file: Path = FILE) -> CreatureJudge:
    """Load the shipped judge, or that in a file."""
    return CreatureJudge(file)


def train_judge(
    file: Path, training: Training, reconstruct: Callable[[Tensor], Tensor], log: Log
) -> dict[str, float]:
    """Train on new images in every step, save, and return errors and accuracies on other new images.

    reconstruct: applies the VAE to images; a part of every batch is reconstructed, so that the artefacts of
    the VAE do not change the judgement.
    """
    from safetensors.torch import save_file

    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    blurred = _draw(rng, RECONSTRUCTED)
    blurred = (reconstruct(blurred[0]), *blurred[1:])
    model, count = Judge(), round(training.batch * RECONSTRUCTED_RATE)
    optimizer = OneCycleAdamW(model.parameters(), training, weight_decay=1e-4)
    for step in range(training.steps):
        picked = torch.randint(RECONSTRUCTED, (count,))
        fresh = _draw(rng, training.batch - count)
        images, wanted, ground, place = (
            torch.cat([a[picked], b]) for a, b in zip(blurred, fresh, strict=True)
        )
        images = (images + 0.05 * torch.randn(1)).clamp(-1, 1)
        predicted, grounds, places = model(images)
        error = (predicted - wanted).square().mean() / VARIANCE
        optimizer.step(error + 0.3 * (cross_entropy(grounds, ground) + cross_entropy(places, place)))
        if training.logs(step):
            log(f"judge {step}: identity error {error.item():.4f}")
    model.eval()
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    with atomic_write(file) as partial:
        save_file(state, partial)
    images, wanted, ground, place = _draw(rng, TESTED)
    with torch.no_grad():
        predicted, grounds, places = (
            torch.cat(part) for part in zip(*map(model, images.split(256)), strict=True)
        )
    accuracy = {
        name: (logits.argmax(dim=1) == labels).float().mean().item()
        for name, logits, labels in (("ground", grounds, ground), ("place", places, place))
    }
    return part_errors(predicted, wanted) | accuracy


def _draw(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of creatures alone (count, 3, 64, 64), identities (count, 13), grounds and places (count,)."""
    identities = draw_identities(rng, count)
    grounds, places = rng.integers(len(GROUND_NAMES), size=count), rng.integers(len(PLACE_NAMES), size=count)
    images = to_tensor(render(alone(identities, grounds, places), rng))
    return images, *map(torch.from_numpy, (identities, grounds, places))


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return to_tensor(np.stack([np.asarray(image.convert("RGB")) for image in images]))
