"""Base class of the methods: each conditions the base model on a group; sampling is the same for all."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ...training.base_model import BaseModel
from ...utils.finite import require_finite

DTYPE_REMEDY = (
    "Set the config's dtype to float32 or bfloat16, or check the weights of the base and the method."
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A method's input: a group without its target."""

    id: str
    prompt: str
    references: tuple[Image.Image, ...]
    captions: tuple[str, ...] = ()  # one for each reference, or none


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of every method; the defaults are those of the authors' inference script."""

    size: int | tuple[int, int]  # pixels: side, or height and width
    steps: int = 30
    guidance: float = 5.0
    negative: str = "monochrome, lowres, bad anatomy, worst quality, low quality"

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


@dataclasses.dataclass(eq=False)
class Method(abc.ABC):
    """A method of the benchmark; the fields after `base` are the settings of its config entry."""

    kind: ClassVar[str]
    condition_remedy: ClassVar[str] = "Set the method's dtype to float32 or bfloat16."
    base: BaseModel

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that changes the images, as JSON values; weights by fingerprint, not by path."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "base"]
        return {"kind": self.kind} | {name: getattr(self, name) for name in names}

    def batch_key(self, task: Task) -> Hashable:
        """Tasks with equal keys may be in one batch."""
        return None

    def prepare(self, task: Task, folder: Path) -> Any:
        """Compute the condition of a group for `attach`. folder: the group's own, for files to cache."""
        return None

    @abc.abstractmethod
    def attach(self, conditions: Sequence[Any], seeds: int) -> AbstractContextManager[None]:
        """Condition the base's UNet while the context is open, and restore it bit for bit.

        Inside, a batch has 2 * len(conditions) * seeds rows: all unconditional rows, then all conditional
        rows, each half group by group with `seeds` rows a group.
        """

    def generate(
        self, tasks: Sequence[Task], conditions: Sequence[Any], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[Image.Image]]:
        """Images of each task, one for each seed.

        Raises ValueError for a size off the latent grid, and NotFiniteError for a condition, a latent or an
        image that is not finite.
        """
        from ...training import sampling as sampler

        (height, width), factor = sampling.sides, self.base.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(
                f"The image size is {height}x{width}; wanted multiples of {factor}, the pixels of one "
                "latent. Change `size` in the config."
            )
        for task, condition in zip(tasks, conditions, strict=True):
            where = f"{self.kind}, group {task.id}"
            require_finite("the condition", condition, where, self.condition_remedy)
        shape = (self.base.vae.config.latent_channels, height // factor, width // factor)
        noise = torch.stack([initial_noise(task.id, seed, shape) for task in tasks for seed in seeds])
        prompts = [task.prompt for task in tasks for _ in seeds]
        settings = dataclasses.asdict(sampling) | {"size": sampling.sides}
        with torch.inference_mode(), self.attach(conditions, len(seeds)):
            latents = sampler.generate_latents(self.base, noise.to(self.base.device), prompts, **settings)
        named = [f"{self.kind}, group {task.id}, seed {seed}" for task in tasks for seed in seeds]
        for where, latent in zip(named, latents, strict=True):
            require_finite("the latent", latent, where, DTYPE_REMEDY)
        decoded = self.base.decode(latents)
        for where, image in zip(named, decoded, strict=True):
            require_finite(
                "the decoded image", image, where, "Check the VAE's weights in the base model's folder."
            )
        images = sampler.to_images(decoded)
        return [images[i : i + len(seeds)] for i in range(0, len(images), len(seeds))]


class Plain(Method):
    """The base model with the prompt only, a lower bound for similarity to the references."""

    kind = "plain"

    def attach(self, conditions: Sequence[Any], seeds: int) -> AbstractContextManager[None]:
        return nullcontext()


def initial_noise(group: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of one image; it depends on the group and the seed only, not on method, device or batch."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def group_seed(group: str) -> int:
    """Seed of everything random in a group but its noise."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big")
