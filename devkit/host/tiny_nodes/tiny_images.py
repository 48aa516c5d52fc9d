"""Random images of given shapes."""

from __future__ import annotations

import torch


def noise(shapes: str, seed: int, with_nan: bool = False) -> list[torch.Tensor]:
    """Return one IMAGE tensor for each shape: noise("1x64x48x3 2x32x32x3", 0).

    Image n, counted over all shapes, only depends on its own shape and on seed + n, so that batches, lists
    and single nodes can make the same images.
    """
    number, images = seed, []
    for shape in shapes.split():
        batch, *size = map(int, shape.split("x"))
        samples = [
            torch.rand(size, generator=torch.Generator().manual_seed(number + i)) for i in range(batch)
        ]
        number += batch
        images.append(torch.stack(samples) if samples else torch.empty(0, *size))
    if with_nan:
        images[0][0, 0, 0, 0] = torch.nan
    return images
