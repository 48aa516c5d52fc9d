"""The tiny Qwen2-VL's vision tower learns to see first, as Qwen2-VL's own did: to tell the attributes of single pictures.

Left to the answers in words alone, it takes thousands of steps before a shape shows in what it passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..mllm.preprocess import patchify
from ..mllm.qwen2_vl import VisionTower
from .images import COUNTS, NAMES

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from .dataset import Pool


class Sight(nn.Module):
    """Pictures as the MLLM sees them (N, H, W, 3), bytes -> for each attribute the scores of its values.

    They are read off the mean of a picture's image tokens: what is in every token, the decoder need not piece together.
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

    def forward(self, pictures: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        count, height, width, _ = pictures.shape
        patch = self.config.patch_size
        grid = torch.tensor([(1, height // patch, width // patch)]).expand(count, -1)
        tokens = self.tower(patchify(pictures, self.config), grid)  # -> (N * image tokens, D)
        return self.heads(tokens.unflatten(0, (count, -1)).mean(dim=1)).split(COUNTS, dim=1)


def pretrain_sight(
    pool: Pool,
    seen: NDArray[np.uint8],
    config: EasyRefConfig,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    log: Callable[[str], None],
) -> VisionTower:
    """A vision tower trained on the pool's pictures, which `seen` holds as the MLLM sees them."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = Sight(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picked = rng.integers(len(seen), size=batch)
        scores, wanted = model(seen[picked]), torch.from_numpy(pool.attributes[picked])
        loss = sum(cross_entropy(part, wanted[:, i]) for i, part in enumerate(scores))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            right = [(part.argmax(1) == wanted[:, i]).float().mean().item() for i, part in enumerate(scores)]
            log(
                f"sight {step}: loss {loss.item():.4f}, right about "
                + ", ".join(f"{name} {part:.2f}" for name, part in zip(NAMES, right, strict=True))
            )
    return model.tower
