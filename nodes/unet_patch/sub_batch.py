"""Recovers each latent's index in the full batch from its noise.

Rebatch Latents, Latent From Batch and detailers sample a batch in parts. The index of each latent in the
whole batch (`batch_index`) selects its noise and does not reach the model, so it is recovered from the noise:
ComfyUI draws the noise of latent i as the i-th draw of a generator with the sampling's seed (comfy/sample.py,
prepare_noise).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from ..host.log import warn_once

if TYPE_CHECKING:
    from torch import Tensor

MAX_DRAWS = 1024  # latents of a whole batch among which a latent is searched
PREFIX_VALUES = 4  # of a draw, compared first

_frames: ContextVar[tuple[int, ...]] = ContextVar("easyref_frames", default=())


class SubBatchWrapper:
    """OUTER_SAMPLE wrapper: publishes the frames of the sampling where they select rows of tokens or masks.

    rows: number of rows of tokens, or masks, that the frames select from.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        seed = kwargs.get("seed", args[6] if len(args) > 6 else None)
        token = _frames.set(self._frames_of(noise, seed))
        try:
            return executor(noise, *args, **kwargs)
        finally:
            _frames.reset(token)

    def _frames_of(self, noise: Tensor, seed: Any) -> tuple[int, ...]:
        latents = len(noise)
        frames = frames_by_noise(noise, seed, MAX_DRAWS) if self.rows > 1 else None
        if frames is None and 1 <= latents < self.rows:
            warn_once(
                f"{latents} latents are sampled with {self.rows} rows of reference tokens or masks, and "
                "their noise does not identify them in the batch (it comes from another node, is the same "
                "for several, or is switched off). They take the first rows. Sample the whole batch at "
                "once, or use ComfyUI's own noise."
            )
        return frames or tuple(range(latents))


def frames_of(options: Mapping[str, Any], latents: int) -> tuple[int, ...]:
    """Frame of each latent of a UNet call.

    AnimateDiff and ComfyUI's context windows sample some frames at a time and name them in the options; the
    sampling itself may be of a part of a batch.
    """
    sampled = _frames.get()
    for window in ((options.get("ad_params") or {}).get("sub_idxs"), _window(options.get("context_window"))):
        if window is not None and len(window) == latents:
            return tuple(sampled[index] if index < len(sampled) else int(index) for index in map(int, window))
    return sampled if len(sampled) == latents else tuple(range(latents))


def _window(window: Any) -> list[int] | None:
    """Frames of one of ComfyUI's context windows, after the causal anchor if it has one."""
    indices, anchor = getattr(window, "index_list", None), getattr(window, "causal_anchor_index", None)
    return indices if indices is None or anchor is None or anchor < 0 else [anchor, *indices]


def frames_by_noise(noise: Tensor, seed: Any, max_draws: int) -> tuple[int, ...] | None:
    """Index of each latent of the noise (B, ...) among the draws with this seed.

    None where a latent's noise is not among the first `max_draws`, and where two latents have the same noise
    (as latents that were joined or share a seed); in that case the batch position is used instead.
    """
    generator = torch.Generator()  # a separate one: the global random state must not change
    try:
        generator.manual_seed(int(seed))
    except (TypeError, ValueError, RuntimeError):  # another pack's sampler may pass none
        return None
    noise = noise.cpu()
    if torch.equal(torch.randn(noise.shape, generator=generator).to(noise.dtype), noise):
        return tuple(range(len(noise)))  # drawn at once, as for a whole batch
    latents = {tuple(latent.flatten()[:PREFIX_VALUES].tolist()): i for i, latent in enumerate(noise)}
    if len(latents) < len(noise):
        return None
    frames: dict[int, int] = {}
    generator.manual_seed(int(seed))
    for draw in range(max_draws):
        values = torch.randn(noise.shape[1:], generator=generator).to(noise.dtype)
        i = latents.get(tuple(values.flatten()[:PREFIX_VALUES].tolist()))
        if i is not None and torch.equal(noise[i], values):
            frames[i] = draw
            if len(frames) == len(noise):
                return tuple(frames[i] for i in range(len(noise)))
    return None
