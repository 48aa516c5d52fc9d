"""Reads the attributes off a picture: a small CNN trained on the same procedural pictures, the judge of what is painted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..files.atomic_write import atomic_write
from .images import ATTRIBUTES, COUNTS, NAMES, every_picture, render

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

FILE = Path(__file__).parent / "weights" / "classifier.safetensors"
COPIES = 4  # pictures of every combination, of which one goes through the codec
CHANNELS = (3, 16, 32, 32, 48)
NARROW, FEATURES = 16, 96  # channels of the last grid, 4 x 4, and what is made of it


class Classifier(nn.Module):
    """Pictures (N, 3, 64, 64) in -1..1 -> for each attribute the scores of its values."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(CHANNELS, CHANNELS[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(CHANNELS[-1], NARROW, 1), nn.ReLU(), nn.Flatten()]
        self.features = nn.Sequential(*layers, nn.Linear(16 * NARROW, FEATURES), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(FEATURES, count) for count in COUNTS)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        features = self.features(pictures)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def indices(self, pictures: Tensor) -> Tensor:
        """The likeliest value of every attribute, (N, 5)."""
        return torch.stack([scores.argmax(-1) for scores in self(pictures)], dim=1)


def load_classifier(file: Path = FILE) -> Callable[[Sequence[Image.Image]], dict[str, list[str]]]:
    """A judge: pictures -> {attribute: the value it sees in each}."""
    from safetensors.torch import load_file

    model = Classifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    model.eval()

    def judge(pictures: Sequence[Image.Image]) -> dict[str, list[str]]:
        seen = model.indices(to_tensor(np.stack([np.asarray(p.convert("RGB")) for p in pictures])))
        return {name: [ATTRIBUTES[name][i] for i in seen[:, n].tolist()] for n, name in enumerate(NAMES)}

    judge.identity = f"{Path(__file__).stem} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    return judge


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """Bytes (N, 64, 64, 3) -> (N, 3, 64, 64) in -1..1."""
    return torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1


def train_classifier(
    file: Path,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    through_codec: Callable[[Tensor], Tensor],
    log: Callable[[str], None],
) -> dict[str, float]:
    """Train on pictures of all combinations, held-out ones too, and save. -> accuracy on pictures it has not seen.

    through_codec: what the latent codec makes of pictures. A part of those shown went through it, so that the judge
    does not stumble over the codec's own marks.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    every = every_picture()
    attributes = np.repeat(every, COPIES, axis=0)
    pictures = to_tensor(render(attributes, rng))
    pictures[::COPIES] = torch.cat([through_codec(part) for part in pictures[::COPIES].split(256)])
    wanted = torch.from_numpy(attributes)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picked = torch.randint(len(pictures), (batch,))
        shown = (pictures[picked] + 0.05 * torch.randn(1)).clamp(-1, 1)
        loss = sum(cross_entropy(s, wanted[picked, i]) for i, s in enumerate(model(shown)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"classifier {step}: loss {loss.item():.4f}")
    model.eval()
    with atomic_write(file) as partial:
        save_file(
            {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}, partial
        )
    attributes = every[rng.integers(len(every), size=4096)]
    right = model.indices(to_tensor(render(attributes, rng))) == torch.from_numpy(attributes)
    return dict(zip(NAMES, right.float().mean(dim=0).tolist(), strict=True))
