"""LoRA, trained for every group on its references (peft, as DreamBooth-LoRA does it), and taken off after painting.

This is tuning at test time: each group costs a training of its own before its first picture. It needs no held-in data,
so it runs on both splits. The paper's "LoRA fails on held-out" is about another use: one LoRA per held-in topic, asked
for a topic that none was trained on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...files.atomic_write import atomic_write
from .clip_pixels import framed
from .method import Method, Task, number_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

    from easyref_core.training.base_model import BaseModel

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # DreamBooth-LoRA's: all attentions of the UNet
FILE = "lora.safetensors"
CAPTIONS = ("references", "prompt", "none")

LoRA = dict[str, "Tensor"]


class LoRAMethod(Method):
    """A LoRA of the group's own.

    captions: what the references are called while training: "references" are the manifest's captions, "prompt" is the
    group's prompt, "none" is no text at all, which leaves the prompt's words as they were.
    size: pixels, at which the references are learned.
    """

    def __init__(
        self,
        base: BaseModel,
        size: int = 1024,
        rank: int = 16,
        steps: int = 500,
        lr: float = 1e-4,
        batch: int = 1,
        weight: float = 1.0,
        captions: str = "none",
    ) -> None:
        super().__init__(base)
        if captions not in CAPTIONS:
            raise ValueError(f"The captions are {captions!r}; wanted one of {', '.join(CAPTIONS)}.")
        self.size, self.rank, self.steps, self.lr = size, rank, steps, lr
        self.batch, self.weight, self.captions = batch, weight, captions

    @property
    def settings(self) -> dict[str, Any]:
        names = ("size", "rank", "steps", "lr", "batch", "weight", "captions")
        return {"kind": "lora"} | {name: getattr(self, name) for name in names}

    def together(self, task: Task) -> Hashable:
        return task.id  # a batch has one UNet, and every group has its own

    def prepare(self, task: Task, folder: Path) -> LoRA:
        """The group's LoRA, trained once: it stays beside its pictures."""
        from safetensors.torch import load_file

        file = folder / FILE
        if not file.is_file():
            lora, _ = train(
                self.base,
                task.references,
                self._texts(task),
                self.size,
                self.rank,
                self.steps,
                self.lr,
                self.batch,
                seed=number_of(task.id),
            )
            save_whole(lora, file)
        return load_file(file, device=str(self.base.device))

    @contextmanager
    def attach(self, conditions: Sequence[LoRA], seeds: int) -> Iterator[None]:
        (lora,) = conditions
        with injected(self.base.unet, self.rank, self.weight) as parameters:
            fill(parameters, lora)
            yield

    def _texts(self, task: Task) -> tuple[str, ...]:
        if self.captions == "references":
            if len(task.captions) != len(task.references):
                raise ValueError(
                    f"Group {task.id} has {len(task.captions)} captions for {len(task.references)} references. Give "
                    'every reference a caption in the manifest, or set captions to "prompt" or "none".'
                )
            return task.captions
        return (task.prompt if self.captions == "prompt" else "",) * len(task.references)


def train(
    base: BaseModel,
    references: Sequence[Any],
    texts: Sequence[str],
    size: int,
    rank: int,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> tuple[LoRA, list[float]]:
    """A LoRA of the references, and the loss of every step: epsilon MSE, AdamW at a constant rate."""
    generator = torch.Generator().manual_seed(seed)
    latents = base.encode_images(square_pixels(references, size).to(base.device))
    text = base.encode_text(texts)
    time_ids = base.time_ids((size, size), (0, 0), (size, size), batch)
    losses = []
    with injected(base.unet, rank, seed=seed) as parameters, torch.enable_grad():
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.01)
        for _ in range(steps):
            picked = torch.randint(len(latents), (batch,), generator=generator)
            last = base.schedule.config.num_train_timesteps
            timesteps = torch.randint(last, (batch,), generator=generator).to(base.device)
            noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(base.device)
            noisy = base.schedule.add_noise(latents[picked], noise, timesteps)
            known = {"text_embeds": text.pooled[picked], "time_ids": time_ids}
            answer = base.unet(
                noisy.to(base.unet.dtype), timesteps, text.states[picked], added_cond_kwargs=known
            )
            loss = torch.nn.functional.mse_loss(answer.sample.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        lora = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    return lora, losses


@contextmanager
def injected(
    unet: UNet2DConditionModel, rank: int, weight: float = 1.0, seed: int = 0
) -> Iterator[dict[str, nn.Parameter]]:
    """Fresh LoRA layers in the UNet's attentions while the context is open; then its own modules are back.

    Yields the LoRA's parameters by name. weight: strength of the LoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    places = [
        (name, module)
        for name, module in unet.named_modules()
        if any(name.endswith(f".{target}") for target in TARGETS)
    ]
    trainable = {name: p.requires_grad for name, p in unet.named_parameters()}
    config = LoraConfig(
        r=rank, lora_alpha=rank * weight, target_modules=list(TARGETS), init_lora_weights="gaussian"
    )
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, unet)
        yield {name: p for name, p in unet.named_parameters() if "lora_" in name}
    finally:
        for name, module in places:
            parent, _, child = name.rpartition(".")
            unet.get_submodule(parent)._modules[child] = module
        if hasattr(unet, "peft_config"):
            del unet.peft_config
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(trainable[name])


def fill(parameters: Mapping[str, nn.Parameter], lora: LoRA) -> None:
    """Give the LoRA's layers these weights."""
    if parameters.keys() != lora.keys():
        wrong = sorted(parameters.keys() ^ lora.keys())
        raise ValueError(
            f"The LoRA does not fit the UNet: only one of them has {wrong[0]}. Delete the file; it is a cache."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(lora[name])


def square_pixels(images: Sequence[Any], size: int) -> Tensor:
    """Images -> (N, 3, size, size) in -1..1: the largest centred square of each."""
    pixels = np.stack([np.asarray(framed(image, size, size)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_whole(lora: LoRA, file: Path) -> None:
    """Write it whole or not at all."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        save_file(lora, partial)
