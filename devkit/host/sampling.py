"""What the in-process tests share: Apply EasyRef, one call of the UNet, one sampling, and a look at the attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import copy_nested_dicts, merge_nested_dicts
from torch import Tensor

from devkit.host import golden

LATENT = (4, 16, 16)

# For tests that take the same sums in two orders: the tiny UNet's norms enlarge float32's rounding to 1e-6, more or less
# by processor.
in_float64 = pytest.mark.parametrize("model", [torch.float64], ids=["float64"], indirect=True)

# Tensors this small gain nothing from more threads, and where cores are shared they wait for each other for seconds.
torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Easy:
    """An EasyRef model with tokens it made, and the Apply node."""

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
        **more: Any,
    ) -> ModelPatcher:
        """more: the inputs that came after these."""
        node = golden.node(self.pack, "EasyRefApply")
        with torch.inference_mode():  # as the host runs nodes
            inputs = model, self.easyref, tokens or self.tokens, weight, start, end, lora
            return node.execute(*inputs, **more).result[0]

    def other_tokens(self, seed: int = 0) -> Any:
        """Random tokens of this checkpoint, for tests that need two groups."""
        random = torch.Generator().manual_seed(seed)
        tokens = golden.part(self.pack, "easyref_core.tokens.reference_tokens").ReferenceTokens
        made = (
            tokens.of(torch.randn(t.shape, generator=random), t.provenance)
            for t in (self.tokens.conditional, self.tokens.unconditional)
        )
        return type(self.tokens)(*made)

    @property
    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        """Per site K and V, rows [unconditional, conditional]."""
        with torch.inference_mode():
            return self.easyref.key_values(self.tokens)


def golden_easy(pack: ModuleType) -> Easy:
    easyref = golden.load(pack)
    with torch.inference_mode():
        return Easy(pack, easyref, golden.tokens(pack, easyref))


def sampling_options(model: ModelPatcher) -> dict[str, Any]:
    """transformer_options as the host hands them to the UNet: the model's own, with its wrappers and callbacks."""
    options = copy_nested_dicts(model.model_options["transformer_options"])
    return merge_nested_dicts(options, {"wrappers": model.wrappers, "callbacks": model.callbacks})


golden_data = functools.cache(golden.expected)


def predict(
    model: ModelPatcher, sigma: float = 1.0, cond_or_uncond: Sequence[int] = (1, 0), control: Any = None
) -> Tensor:
    """The UNet's answer to the golden input, a batch of [unconditional, conditional], under the model's patches."""
    comfy.model_management.load_models_gpu([model])
    expected = golden_data()
    unet = model.model.diffusion_model
    time_ids = timestep_embedding(expected["unet.time_ids"].flatten(), 8).reshape(2, -1)
    y = torch.cat([expected["unet.text_embeds"], time_ids], dim=1)
    options = sampling_options(model)
    options |= {"cond_or_uncond": list(cond_or_uncond), "sigmas": torch.full((2,), sigma)}
    with torch.inference_mode():
        return unet(
            expected["unet.sample"].to(unet.dtype),
            expected["unet.timestep"],
            context=expected["unet.encoder_hidden_states"].to(unet.dtype),
            y=y.to(unet.dtype),
            control=control,
            transformer_options=options,
        )


def start_of(batch: int = 1) -> Tensor:
    """Noise to start from, always the same."""
    return torch.randn(batch, *LATENT, generator=torch.Generator().manual_seed(1))


def sample(guider: comfy.samplers.CFGGuider, steps: int = 2, batch: int = 1) -> Tensor:
    """Sample from a guider as SamplerCustomAdvanced does: euler, from full noise."""
    schedule = comfy.samplers.calculate_sigmas(
        guider.model_patcher.get_model_object("model_sampling"), "normal", steps
    )
    noise = start_of(batch)
    with torch.inference_mode():
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            schedule,
            disable_pbar=True,
            seed=0,
        )


def cfg_guider(model: ModelPatcher, positive: list, negative: list, cfg: float = 5.0) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


@dataclasses.dataclass(frozen=True, eq=False)
class Attended:
    """One computation of the reference term: where, and with which K and V."""

    site: str  # path of the attention in the host's UNet
    key_value: tuple[Tensor, Tensor]  # the weight in them


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
