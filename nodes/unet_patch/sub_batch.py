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

from ..host.log import warn_once

if TYPE_CHECKING:
    from torch import Tensor

MAX_DRAWS = 1024  # latents of a whole batch among which a latent is looked for
PREFIX = 4  # values of a draw that are compared first

_frames: ContextVar[tuple[int, ...]] = ContextVar("easyref_frames", default=())


def sampled_frames() -> tuple[int, ...]:
    """Number, in the whole batch, of each latent of the sampling that runs; () where no sampling runs."""
    return _frames.get()


class SubBatchWrapper:
    """OUTER_SAMPLE wrapper: reads the numbers of the latents while rows of tokens or masks are chosen by
    them.

    rows: rows of tokens, or masks, that the latents choose from.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        seed = kwargs.get("seed", args[6] if len(args) > 6 else None)
        token = _frames.set(self._numbers(noise, seed))
        try:
            return executor(noise, *args, **kwargs)
        finally:
            _frames.reset(token)

    def _numbers(self, noise: Tensor, seed: Any) -> tuple[int, ...]:
        latents = len(noise)
        numbers = frames_by_noise(noise, seed, MAX_DRAWS) if self.rows > 1 else None
        if numbers is None and 1 <= latents < self.rows:
            warn_once(
                f"{latents} latents are sampled with {self.rows} rows of reference tokens or masks, and "
                "their noise does not say which of the batch they are (it is of another node, the same for "
                "several, or switched off). They take the first rows. Sample the whole batch at once, or "
                "use ComfyUI's own noise."
            )
        return numbers or tuple(range(latents))


def frames_by_noise(noise: Tensor, seed: Any, max_draws: int) -> tuple[int, ...] | None:
    """Number of each latent of the noise (B, ...) among the draws with this seed.

    None where a latent's noise is not among the first `max_draws`, and where two latents have the same noise,
    as latents that were joined or share a seed have: their places in the batch say more then.
    """
    generator = torch.Generator()  # of its own: the global one is left as it is
    try:
        generator.manual_seed(int(seed))
    except (TypeError, ValueError, RuntimeError):  # a pack's own sampler may give none
        return None
    noise = noise.cpu()
    if torch.equal(torch.randn(noise.shape, generator=generator).to(noise.dtype), noise):
        return tuple(range(len(noise)))  # drawn at once, as for a whole batch
    latents = {tuple(latent.flatten()[:PREFIX].tolist()): i for i, latent in enumerate(noise)}
    if len(latents) < len(noise):
        return None
    numbers: dict[int, int] = {}
    generator.manual_seed(int(seed))
    for draw in range(max_draws):
        values = torch.randn(noise.shape[1:], generator=generator).to(noise.dtype)
        i = latents.get(tuple(values.flatten()[:PREFIX].tolist()))
        if i is not None and torch.equal(noise[i], values):
            numbers[i] = draw
            if len(numbers) == len(noise):
                return tuple(numbers[i] for i in range(len(noise)))
    return None
