"""Part of a batch that a sampling is of, read from its noise.

Rebatch Latents, Latent From Batch and detailers sample a batch in parts. The number of each latent in the
whole batch (`batch_index`) chooses its noise and does not reach the model, so it is read back from the noise:
ComfyUI draws the noise of latent i as the i-th draw of a generator with the sampling's seed (comfy/sample.py,
prepare_noise).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from .log import warn_once

if TYPE_CHECKING:
    from torch import Tensor

MIN_DRAWS = 64  # draws that are compared even where there are fewer rows of tokens

_sampled: ContextVar[tuple[int, ...]] = ContextVar("easyref_sampled_frames", default=())


def sampled_frames() -> tuple[int, ...]:
    """Number, in the whole batch, of each latent of the sampling that runs; () where no sampling runs."""
    return _sampled.get()


class SubBatchWrapper:
    """OUTER_SAMPLE wrapper: reads the numbers of the latents while rows of tokens or masks are chosen by
    them.

    rows: rows of tokens, or masks, that the latents choose from.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        seed = kwargs.get("seed", args[6] if len(args) > 6 else None)
        token = _sampled.set(self._frames(noise, seed))
        try:
            return executor(noise, *args, **kwargs)
        finally:
            _sampled.reset(token)

    def _frames(self, noise: Tensor, seed: int | None) -> tuple[int, ...]:
        latents = len(noise)
        frames = tuple(range(latents))
        if self.rows == 1:
            return frames
        found = None if seed is None else frames_by_noise(noise, seed, max(self.rows + latents, MIN_DRAWS))
        if found is None and latents < self.rows:
            warn_once(
                f"{latents} latents are sampled with {self.rows} rows of reference tokens or masks, and "
                "their noise does not say which of the batch they are (it was made by another node, or "
                "switched off). They take the first rows. Sample the whole batch at once, or use ComfyUI's "
                "own noise."
            )
        return found or frames


def frames_by_noise(noise: Tensor, seed: int, draws: int) -> tuple[int, ...] | None:
    """Number of each latent of the noise (B, ...) among the first `draws` draws with this seed; None where
    one is not found.
    """
    noise = noise.cpu()
    frames = range(len(noise))
    generator = torch.Generator().manual_seed(seed)  # of its own: the global one is left as it is
    if torch.equal(torch.randn(noise.shape, generator=generator).to(noise.dtype), noise):
        return tuple(frames)  # drawn at once, as for a whole batch
    found: dict[int, int] = {}
    generator.manual_seed(seed)
    for draw in range(draws):
        drawn = torch.randn(noise.shape[1:], generator=generator).to(noise.dtype)
        found |= {i: draw for i in frames if i not in found and torch.equal(noise[i], drawn)}
        if len(found) == len(noise):
            return tuple(found[i] for i in frames)
    return None
