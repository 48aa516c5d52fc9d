"""Helpers of the in-process tests: Apply EasyRef, a UNet call, a sampling, and a log of the attentions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.context_windows
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import copy_nested_dicts, merge_nested_dicts
from torch import Tensor

from devkit.host import golden
from devkit.host.tiny_nodes.tiny_sdxl import random_conditioning

SITES = 17  # cross-attentions of the tiny UNet
PROMPTS = random_conditioning(1, 77), random_conditioning(2, 77)  # positive, negative
LEFT = torch.tensor([1.0, 0.0]).repeat_interleave(8).expand(1, 16, 16)  # mask of the left half of a latent

# For tests that compute the same sums in two orders: the tiny UNet's norms amplify float32's rounding to
# 1e-6, more or less by processor.
in_float64 = pytest.mark.parametrize("model", [torch.float64], ids=["float64"], indirect=True)

# Tensors this small gain nothing from more threads, and where cores are shared they wait for each other for
# seconds.
torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Easy:
    """An EasyRef model with tokens that it produced, and the Apply node."""

    pack: ModuleType
    easyref: Any
    tokens: Any

    def apply(
        self,
        model: ModelPatcher,
        weight: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        lora: float = 1.0,
        tokens: Any = None,
        **settings: Any,
    ) -> ModelPatcher:
        """settings: the optional inputs of Apply EasyRef."""
        inputs = model, tokens or self.tokens, weight, start, end, lora
        settings = {"easyref": self.easyref, **settings}
        return golden.execute(self.pack, "EasyRefApply", *inputs, **settings).result[0]

    def pair(self, conditional: Tensor, unconditional: Tensor) -> Any:
        """A TokenPair of this checkpoint."""
        pairs = (conditional, self.tokens.conditional), (unconditional, self.tokens.unconditional)
        return type(self.tokens)(*(like.of(values, like.provenance) for values, like in pairs))

    def other_tokens(self, seed: int = 0) -> Any:
        """Random tokens of this checkpoint, for tests that need two groups."""
        random = torch.Generator().manual_seed(seed)
        return self.pair(*(torch.randn(self.tokens.conditional.shape, generator=random) for _ in range(2)))

    def batched_tokens(self, count: int) -> tuple[Any, list[Any]]:
        """Tokens of `count` groups as one pair with one unconditional row, and each group's own pair."""
        rows = [Tensor(self.other_tokens(seed).conditional) for seed in range(count)]
        unconditional = Tensor(self.tokens.unconditional)
        return self.pair(torch.cat(rows), unconditional), [self.pair(row, unconditional) for row in rows]

    def two_sided_layout(self) -> tuple[Any, ...]:
        """The layout of a batch of [unconditional, conditional], of one 16 x 16 latent."""
        row = golden.part(self.pack, "nodes.unet_patch.batch_layout").Row
        crop = golden.part(self.pack, "easyref_core.unet.masks").full_crop(16, 16)
        return tuple(row(side, 0, 0, crop) for side in (True, False))

    @property
    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        """Per site K and V, rows [unconditional, conditional]."""
        with torch.inference_mode():
            return self.easyref.key_values(self.tokens)


def golden_easy(pack: ModuleType, **options: Any) -> Easy:
    """options: of golden.load."""
    easyref = golden.load(pack, **options)
    return Easy(pack, easyref, golden.tokens(pack, easyref))


def easy_of_sites(easy: Easy, widths: Mapping[Any, int], path: Path) -> Easy:
    """An EasyRef with the MLLM of `easy`, random projections and LoRA for these sites, saved and loaded."""
    checkpoint = golden.part(easy.pack, "easyref_core.checkpoint.checkpoint")
    model, random = easy.easyref.model, torch.Generator().manual_seed(0)
    tensors = model.mllm.state_dict()
    for name, shape in checkpoint.expected_shapes(model.config, widths).items():
        if name not in tensors:
            tensors[name] = torch.randn(shape, generator=random) / shape[-1] ** 0.5
    checkpoint.save(path, model.config, list(widths), tensors)
    return golden_easy(easy.pack, checkpoint=path)


def sampling_options(model: ModelPatcher) -> dict[str, Any]:
    """transformer_options as the host passes them to the UNet, with the model's wrappers and callbacks."""
    options = copy_nested_dicts(model.model_options["transformer_options"])
    return merge_nested_dicts(options, {"wrappers": model.wrappers, "callbacks": model.callbacks})


def sigma_at(model: ModelPatcher, percent: float) -> float:
    return model.get_model_object("model_sampling").percent_to_sigma(percent)


def golden_adm() -> Tensor:
    """The golden pooled text and embedded sizes, as the UNet's y."""
    expected = golden.expected()
    time_ids = timestep_embedding(expected["unet.time_ids"].flatten(), 8).reshape(2, -1)
    return torch.cat([expected["unet.text_embeds"], time_ids], dim=1)


def predict(
    model: ModelPatcher, sigma: float = 1.0, cond_or_uncond: Sequence[int] = (1, 0), control: Any = None
) -> Tensor:
    """The patched UNet's output for the golden input, a batch of [unconditional, conditional]."""
    comfy.model_management.load_models_gpu([model])
    expected = golden.expected()
    unet = model.model.diffusion_model
    options = sampling_options(model)
    options |= {"cond_or_uncond": list(cond_or_uncond), "sigmas": torch.full((2,), sigma)}
    with torch.inference_mode():
        return unet(
            expected["unet.sample"].to(unet.dtype),
            expected["unet.timestep"],
            context=expected["unet.encoder_hidden_states"].to(unet.dtype),
            y=golden_adm().to(unet.dtype),
            control=control,
            transformer_options=options,
        )


def fixed_noise(batch: int = 1, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(1))


def sample(
    guider: comfy.samplers.CFGGuider, steps: int = 2, batch: int = 1, size: tuple[int, int] = (16, 16)
) -> Tensor:
    """Sample from a guider as SamplerCustomAdvanced does: euler, from full noise."""
    sampling, noise = guider.model_patcher.get_model_object("model_sampling"), fixed_noise(batch, size)
    schedule = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), euler, schedule, disable_pbar=True, seed=0)


def cfg_guider(model: ModelPatcher, positive: list, negative: list, cfg: float = 5.0) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def sample_cfg(
    model: ModelPatcher, cfg: float = 5.0, conds: tuple[list, list] = PROMPTS, **options: Any
) -> Tensor:
    """Sample with CFG; options: of `sample`."""
    return sample(cfg_guider(model, *conds, cfg), **options)


def in_windows(model: ModelPatcher, frames: int = 2) -> ModelPatcher:
    """A clone that samples a batch as a video, some frames at a time."""
    windows, clone = comfy.context_windows, model.clone()
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
        context_length=frames,
        context_overlap=0,
    )
    return clone


def state(model: ModelPatcher) -> dict[str, Any]:
    """Everything that a patch could change in a patcher; its dicts and lists are copied."""
    names = "model_options patches attachments wrappers callbacks object_patches injections".split()
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    callbacks = {site: list(getattr(patch, "callbacks", ())) for site, patch in replaced.items()}
    copies = {name: copy_nested_dicts(getattr(model, name)) for name in names}
    return {**copies, "patches_uuid": model.patches_uuid, "callbacks of patches": callbacks}


@dataclasses.dataclass(frozen=True, eq=False)
class Attended:
    """One computation of the reference term."""

    site: str  # path of the attention in the host's UNet
    key_value: tuple[Tensor, Tensor]  # with the weight applied


@contextmanager
def watch_attention(pack: ModuleType, model: ModelPatcher) -> Iterator[list[Attended]]:
    """All reference terms that the UNet of `model` computes meanwhile, in order."""
    site_patch = golden.part(pack, "nodes.unet_patch.site_patch")
    compute = site_patch.reference_attention
    calls: list[Attended] = []
    site = [""]

    def watched(q: Tensor, key_value: tuple[Tensor, Tensor], heads: int) -> Tensor:
        calls.append(Attended(site[0], key_value))
        return compute(q, key_value, heads)

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: site.__setitem__(0, path)

    hooks = [  # the first module of an attention to run
        module.to_q.register_forward_pre_hook(enter(name))
        for name, module in model.model.diffusion_model.named_modules()
        if name.endswith(".attn2")
    ]
    site_patch.reference_attention = watched
    try:
        yield calls
    finally:
        site_patch.reference_attention = compute
        for hook in hooks:
            hook.remove()
