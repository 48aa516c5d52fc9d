"""A small CNN that classifies the attributes of an image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..files.atomic_write import atomic_write
from .images import ATTRIBUTES, COUNTS, NAMES, all_combinations, render
from .optimizer import Log, OneCycleAdamW, Training
from .worlds import SHAPES

FILE = SHAPES.weights / SHAPES.judge
COPIES = 4  # images of every combination; one of them is reconstructed by the VAE
CHANNELS = (3, 16, 32, 32, 48)
NARROW, FEATURES = 16, 96  # channels of the last 4 x 4 grid, and features computed from it


class Classifier(nn.Module):
    """Images (N, 3, 64, 64) in -1..1 -> for each attribute the logits of its values."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(CHANNELS, CHANNELS[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(CHANNELS[-1], NARROW, 1), nn.ReLU(), nn.Flatten()]
        self.features = nn.Sequential(*layers, nn.Linear(16 * NARROW, FEATURES), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(FEATURES, count) for count in COUNTS)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.features(images)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most likely value of every attribute, (N, 5)."""
        return torch.stack([logits.argmax(-1) for logits in self(images)], dim=1)


class AttributeClassifier:
    """Images -> {attribute: the predicted value of each image}; `identity` names the weights."""

    def __init__(self, file: Path) -> None:
        from safetensors.torch import load_file

        self.model = Classifier()
        self.model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        self.model.eval()
        self.identity = f"{Path(__file__).stem} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, list[str]]:
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        columns = self.model.predict(to_tensor(pixels)).T.tolist()
        return {
            name: [ATTRIBUTES[name][i] for i in column] for name, column in zip(NAMES, columns, strict=True)
        }


def load_classifier(file: Path = FILE) -> AttributeClassifier:
    """Load the shipped classifier, or that in a file."""
    return AttributeClassifier(file)


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Bytes (N, 64, 64, 3) -> (N, 3, 64, 64) in -1..1."""
    return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1


def train_classifier(
    file: Path, training: Training, reconstruct: Callable[[Tensor], Tensor], log: Log
) -> dict[str, float]:
    """Train on all combinations, held-out ones too, save, and return the accuracy by attribute on new images.

    reconstruct: applies the VAE to images; some of the training images are reconstructed, so that the
    artefacts of the VAE do not change the predictions.
    """
    from safetensors.torch import save_file

    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    combinations = all_combinations()
    attributes = np.repeat(combinations, COPIES, axis=0)
    images = to_tensor(render(attributes, rng))
    images[::COPIES] = reconstruct(images[::COPIES])
    labels = torch.from_numpy(attributes)
    model = Classifier()
    optimizer = OneCycleAdamW(model.parameters(), training, weight_decay=1e-4, max_norm=None)
    for step in range(training.steps):
        picked = torch.randint(len(images), (training.batch,))
        inputs = (images[picked] + 0.05 * torch.randn(1)).clamp(-1, 1)
        loss = sum(cross_entropy(logits, labels[picked, i]) for i, logits in enumerate(model(inputs)))
        optimizer.step(loss)
        if training.logs(step):
            log(f"classifier {step}: loss {loss.item():.4f}")
    model.eval()
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    with atomic_write(file) as partial:
        save_file(state, partial)
    attributes = combinations[rng.integers(len(combinations), size=4096)]
    correct = model.predict(to_tensor(render(attributes, rng))) == torch.from_numpy(attributes)
    return dict(zip(NAMES, correct.float().mean(dim=0).tolist(), strict=True))
