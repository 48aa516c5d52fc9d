"""What a method is: a way to condition the base model on a group, under a painting that is the same for all."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from easyref_core.training.base_model import BaseModel

LATENT_CHANNELS = 4


@dataclasses.dataclass(frozen=True)
class Task:
    """One group as a method sees it: never the target."""

    id: str
    prompt: str
    references: tuple[Image.Image, ...]
    captions: tuple[str, ...] = ()  # of the references, in their order; () where there are none


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How every method's pictures are painted; the base model and its schedule are shared too."""

    size: int | tuple[int, int]  # pixels of a picture: side, or height and width
    steps: int = 30  # these three: the authors' inference script
    guidance: float = 5.0
    negative: str = "monochrome, lowres, bad anatomy, worst quality, low quality"

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


class Method(abc.ABC):
    """A method of the benchmark, built once per run from a config entry."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides this method's pictures, as JSON can hold it; weights by fingerprint, not by path."""

    def together(self, task: Task) -> Hashable:
        """Tasks of equal value may be painted in one batch."""
        return None

    def prepare(self, task: Task, folder: Path) -> Any:
        """What is computed once per group: the condition that `attach` takes. folder: the group's own, for what is
        worth keeping beside its pictures."""
        return None

    @abc.abstractmethod
    def attach(self, conditions: Sequence[Any], seeds: int) -> AbstractContextManager[None]:
        """Condition the base's UNet while the context is open, and leave it bit for bit as it was.

        Meanwhile a batch has 2 * len(conditions) * seeds rows: all unconditional rows, then the conditional ones, each
        half group by group, `seeds` rows a group.
        """

    def generate_images(
        self, tasks: Sequence[Task], conditions: Sequence[Any], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[Image.Image]]:
        """Pictures of each task, one for each seed."""
        from easyref_core.training.sampling import generate_images

        shape = latent_shape(self.base, sampling)
        noise = torch.stack([starting_noise(task.id, seed, shape) for task in tasks for seed in seeds])
        prompts = [task.prompt for task in tasks for _ in seeds]
        with torch.inference_mode(), self.attach(conditions, len(seeds)):
            pictures = generate_images(
                self.base,
                noise.to(self.base.device),
                prompts,
                sampling.negative,
                sampling.guidance,
                sampling.steps,
                sampling.sides,
            )
        return [pictures[i : i + len(seeds)] for i in range(0, len(pictures), len(seeds))]


def latent_shape(base: BaseModel, sampling: Sampling) -> tuple[int, int, int]:
    """Shape of one picture's latents (4, h, w).

    Raises ValueError for a size that the VAE cannot paint.
    """
    factor = base.vae_scale_factor
    height, width = sampling.sides
    if height % factor or width % factor:
        raise ValueError(
            f"The pictures' size is {height}x{width}; wanted multiples of {factor}, one place of the latent grid. "
            "Change `size` in the config."
        )
    return LATENT_CHANNELS, height // factor, width // factor


def starting_noise(group: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of one picture: the same for every method, another for every group, on any device and in any batch."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def number_of(group: str) -> int:
    """A seed of the group's own, for what is random besides the painting."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big")
