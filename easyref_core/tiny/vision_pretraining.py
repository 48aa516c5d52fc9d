"""Pretraining of the tiny Qwen2-VL's vision tower: it classifies the attributes of single images.

Without it, the answers in text train the tower for thousands of steps before its features represent shape.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..mllm.config import EasyRefConfig
from ..mllm.preprocess import patchify
from ..mllm.qwen2_vl import VisionTower
from .dataset import Dataset
from .images import COUNTS, NAMES
from .optimizer import Log, OneCycleAdamW, Training


class VisionClassifier(nn.Module):
    """Preprocessed images (N, H, W, 3), bytes -> for each attribute the logits of its values.

    The head's input is the mean of an image's tokens, so that every token represents the whole image.
    """

    def __init__(self, config: EasyRefConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config, nn)
        self.heads = nn.Linear(config.hidden_size, sum(COUNTS))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        count, height, width, _ = images.shape
        patch = self.config.patch_size
        grid = torch.tensor([(1, height // patch, width // patch)]).expand(count, -1)
        tokens = self.tower(patchify(images, self.config), grid)  # -> (N * image tokens, D)
        return self.heads(tokens.unflatten(0, (count, -1)).mean(dim=1)).split(COUNTS, dim=1)


def pretrain_vision(
    dataset: Dataset, images: NDArray[np.uint8], config: EasyRefConfig, training: Training, log: Log
) -> VisionTower:
    """Train a vision tower on `images`, the dataset's images after the MLLM's preprocessing."""
    rng = np.random.default_rng(training.seed)
    torch.manual_seed(training.seed)
    model = VisionClassifier(config)
    optimizer = OneCycleAdamW(model.parameters(), training)
    for step in range(training.steps):
        picked = rng.integers(len(images), size=training.batch)
        logits, labels = model(images[picked]), torch.from_numpy(dataset.attributes[picked])
        loss = sum(cross_entropy(part, labels[:, i]) for i, part in enumerate(logits))
        optimizer.step(loss)
        if training.logs(step, every=250):
            correct = [(part.argmax(1) == labels[:, i]).float().mean() for i, part in enumerate(logits)]
            accuracy = ", ".join(f"{name} {part:.2f}" for name, part in zip(NAMES, correct, strict=True))
            log(f"vision tower {step}: loss {loss.item():.4f}, accuracy {accuracy}")
    return model.tower
