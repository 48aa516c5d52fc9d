"""LoRA trained on each group's references with peft, as DreamBooth-LoRA does, and removed after generating.

This is test-time tuning: a LoRA is trained per group before generation. It needs no held-in
data, so it runs on both splits. The paper's "LoRA fails on held-out" is about another use: one LoRA for each
held-in topic, applied to a topic that none was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...files.atomic_write import atomic_write
from ...training.objective import denoising_loss
from ...utils.finite import require_finite
from .clip_pixels import square_pixels
from .method import Method, Task, group_seed

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # DreamBooth-LoRA's: all attentions of the UNet
FILE = "lora.safetensors"
REMEDY = "Lower lr, or set the config's dtype to bfloat16 or float32."
CAPTIONS = ("references", "prompt", "none")

LoRA = dict[str, "Tensor"]


@dataclasses.dataclass(eq=False)
class LoRAMethod(Method):
    """A LoRA for each group.

    captions: texts of the references in training. "references" are the manifest's captions, "prompt" is the
    group's prompt, and "none" is an empty text, which leaves the meaning of the prompt's words unchanged.
    size: pixels of the references in training.
    seed: changes the initial weights and the noise of every group.
    """

    kind = "lora"

    size: int = 1024
    rank: int = 16
    steps: int = 500
    lr: float = 1e-4
    batch: int = 1
    weight: float = 1.0
    captions: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.captions not in CAPTIONS:
            raise ValueError(f"The captions are {self.captions!r}; wanted one of {', '.join(CAPTIONS)}.")

    @property
    def settings(self) -> dict[str, Any]:
        # Images of float16 LoRAs, as they were trained before, are refused as made with other settings.
        half = self.base.unet.dtype != torch.float32
        return super().settings | ({"trained_in": "float32"} if half else {})

    def batch_key(self, task: Task) -> Hashable:
        return task.id  # a batch has one UNet, and every group has its own

    def prepare(self, task: Task, folder: Path) -> LoRA:
        """The group's LoRA; it is trained once and cached beside its images."""
        from safetensors.torch import load_file, save_file

        file = folder / FILE
        if not file.is_file():
            where = f"lora, group {task.id}"
            lora, _ = self.train(task.references, self._texts(task), self.seed + group_seed(task.id), where)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as partial:
                save_file(lora, partial)
        lora = load_file(file, device=str(self.base.device))
        require_finite("the cached LoRA", lora, f"lora, group {task.id}", f"Delete {file} to train it again.")
        return lora

    @contextmanager
    def attach(self, conditions: Sequence[LoRA], seeds: int) -> Iterator[None]:
        (lora,) = conditions
        with injected(self.base.unet, self.rank, self.weight) as parameters:
            load_lora(parameters, lora)
            yield

    def train(
        self, references: Sequence[Any], texts: Sequence[str], seed: int, where: str = "lora"
    ) -> tuple[LoRA, list[float]]:
        """Train a LoRA (denoising loss, AdamW, constant rate) and return it with the loss of every step.

        The LoRA is float32 in every dtype of the base, because AdamW's epsilon vanishes in float16 and its
        division then gives NaN. Raises NotFiniteError, which names `where` and the step, for a loss or weight
        that is not finite.
        """
        base, batch = self.base, self.batch
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.from_numpy(square_pixels(references, self.size)).float() / 127.5 - 1
        latents = base.encode_images(pixels.to(base.device))
        text = base.encode_text(texts)
        time_ids = base.time_ids((self.size, self.size), (0, 0), (self.size, self.size), batch)
        num_timesteps = base.schedule.config.num_train_timesteps
        losses, dtype, device = [], base.unet.dtype, base.device.type
        half = dtype != torch.float32
        # Gradients of a mean over many latents underflow in float16, so the loss is scaled there.
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        with injected(base.unet, self.rank, seed=seed) as parameters, torch.enable_grad():
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
            optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=0.01)
            for step in range(self.steps):
                picked = torch.randint(len(latents), (batch,), generator=generator)
                timesteps = torch.randint(num_timesteps, (batch,), generator=generator).to(base.device)
                noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(base.device)
                added = {"text_embeds": text.pooled[picked], "time_ids": time_ids}
                inputs = {"encoder_hidden_states": text.states[picked], "added_cond_kwargs": added}
                with torch.autocast(device, dtype=dtype if half else None, enabled=half):
                    predict = partial(predict_with, base.unet, timesteps, inputs)
                    loss = denoising_loss(base.schedule, latents[picked], noise, timesteps, predict)
                losses.append(loss.item())
                require_finite("the loss", losses[-1], f"{where}, step {step}", REMEDY)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            lora = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        require_finite("the trained LoRA", lora, f"{where}, after {self.steps} steps", REMEDY)
        return lora, losses

    def _texts(self, task: Task) -> tuple[str, ...]:
        if self.captions == "references":
            if len(task.captions) != len(task.references):
                raise ValueError(
                    f"Group {task.id} has {len(task.captions)} captions for {len(task.references)} "
                    "references. Give "
                    'every reference a caption in the manifest, or set captions to "prompt" or "none".'
                )
            return task.captions
        return (task.prompt if self.captions == "prompt" else "",) * len(task.references)


def predict_with(
    unet: UNet2DConditionModel, timesteps: Tensor, inputs: Mapping[str, Any], noisy: Tensor
) -> Tensor:
    """The UNet's prediction (B, 4, h, w) for noisy latents of that shape, in the UNet's dtype."""
    return unet(noisy.to(unet.dtype), timesteps, **inputs).sample


@contextmanager
def injected(
    unet: UNet2DConditionModel, rank: int, weight: float = 1.0, seed: int = 0
) -> Iterator[dict[str, nn.Parameter]]:
    """Inject new LoRA layers into the UNet's attentions while the context is open, then restore its modules.

    Yields the LoRA's parameters by name. weight: strength of the LoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = tuple(f".{target}" for target in TARGETS)
    modules = [(name, module) for name, module in unet.named_modules() if name.endswith(targets)]
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
        for name, module in modules:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, module)
        if hasattr(unet, "peft_config"):
            del unet.peft_config
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(trainable[name])


def load_lora(parameters: Mapping[str, nn.Parameter], lora: LoRA) -> None:
    """Copy a LoRA into the parameters. Raises ValueError if their names differ."""
    if parameters.keys() != lora.keys():
        wrong = sorted(parameters.keys() ^ lora.keys())
        raise ValueError(
            f"The LoRA does not fit the UNet: only one of them has {wrong[0]}. Delete the file; it is a "
            "cache."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(lora[name])
