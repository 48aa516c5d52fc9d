"""How the reference term enters ComfyUI's UNet: the only file that touches a ModelPatcher's patches.

One Apply node is one Injection: K and V of its tokens, a weight and a window. It lives in the patcher's attachments.
At every UNet call a wrapper hands the injections that act now to the attention sites, in transformer_options; the
SitePatch at each site adds its injection's term. So model_options holds 70 addresses and no tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.lora
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..easyref_core.attention import KeyValue, reference_attention
from ..easyref_core.unet_layout import Site, parse_comfy, require_fit
from .guidance import FIRST_SIGMA, SIGMA, announce_step, name_conditionings, read_sigma, unconditional_runs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from .mllm_patcher import HostedEasyRef
    from .sockets import TokenPair

KEY = "easyref"
STEP = "easyref_step"  # in transformer_options: the Step of this UNet call


_ids = itertools.count()


class Injection:
    """One Apply node's contribution. Never changed after it is made, and shared by every clone of the model."""

    def __init__(self, key_values: list[KeyValue], weight: float, window: tuple[float, float]) -> None:
        """key_values: per site K and V, rows [unconditional, conditional]. window: (first sigma, last sigma)."""
        self.id = next(_ids)
        self.weight, self.window = weight, window
        self._key_values = key_values
        self._placed: dict[tuple, list[KeyValue]] = {}

    def acts(self, sigma: float) -> bool:
        first, last = self.window
        return last <= sigma <= first

    def at(self, device: torch.device, dtype: torch.dtype, unconditional: tuple[bool, ...]) -> list[KeyValue]:
        """K and V per site, one row for each run of the batch; moved to the device once and kept while sampling."""
        place = device, dtype, unconditional
        if place not in self._placed:
            rows = [0 if is_unconditional else 1 for is_unconditional in unconditional]
            self._placed[place] = [
                (k[rows].to(device, dtype), v[rows].to(device, dtype)) for k, v in self._key_values
            ]
        return self._placed[place]

    def release(self) -> None:
        self._placed.clear()

    def __deepcopy__(self, memo: dict) -> Injection:
        return self


@dataclasses.dataclass(frozen=True)
class Step:
    """What the sites are told in one UNet call; made once, so that no site reads sigma back from the device."""

    sigma: float
    acting: dict[int, tuple[list[KeyValue], float]]  # {Injection.id: (K and V per site, weight)}
    whole_blocks: dict[
        tuple, Callable[..., Tensor]
    ]  # foreign replacements for all sites of a (block, number)


IDLE = Step(FIRST_SIGMA, {}, {})  # where a pack calls the UNet without the patcher's wrappers: the text alone


@dataclasses.dataclass(frozen=True)
class Attached:
    """What EasyRef has added to one model: an attachment of the patcher, replaced as a whole, never edited."""

    injections: tuple[Injection, ...] = ()
    lora: tuple[tuple[str, float], ...] = ()  # (checkpoint fingerprint, strength)


@dataclasses.dataclass(frozen=True, eq=False)
class SitePatch:
    """attn2 replacement at one site: what was there before, plus one injection's reference term."""

    injection: int  # Injection.id
    position: int  # of the site, in processor order
    previous: Callable[..., Tensor] | None
    added: list[tuple[Callable[..., Tensor], dict[str, Any]]] = dataclasses.field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        step: Step = extra_options.get(STEP, IDLE)
        previous = self.previous or text_attention
        if not isinstance(previous, SitePatch):
            # Set before this patch or after it: the host looks for a site's own patch first and would not come to it.
            previous = step.whole_blocks.get(extra_options.get("block"), previous)
        out = previous(q, k, v, extra_options)
        if self.injection in step.acting:
            key_values, weight = step.acting[self.injection]
            key_value = tuple(t.to(q.dtype) for t in key_values[self.position])
            out = out + reference_attention(q, key_value, extra_options["n_heads"], weight)
        for callback, options in self.added:
            if options.get("sigma_end", 0.0) <= step.sigma <= options.get("sigma_start", math.inf):
                out = out + callback(out, q, k, v, extra_options, **options)
        return out.to(q.dtype)

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """What IPAdapter_plus and InstantID call on the patch they find: their term, within their own window.

        They call it on a clone they made; `_own_additions` has given that clone lists of its own.
        """
        self.added.append((callback, options))

    # What the host calls on every patch it finds, with devices and dtypes, before loading and after sampling: nothing
    # here has weights, but what was there before may have.

    def to(self, *place: Any) -> SitePatch:
        previous = self.previous.to(*place) if hasattr(self.previous, "to") else self.previous
        return self if previous is self.previous else dataclasses.replace(self, previous=previous)

    def models(self) -> list[Any]:
        return self.previous.models() if hasattr(self.previous, "models") else []

    def cleanup(self) -> None:
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()

    def __deepcopy__(self, memo: dict) -> SitePatch:
        return dataclasses.replace(self, added=list(self.added))


def condition(
    model: ModelPatcher,
    easyref: HostedEasyRef,
    tokens: TokenPair,
    weight: float,
    start_percent: float,
    end_percent: float,
    lora_strength: float,
) -> ModelPatcher:
    """A clone of `model` that attends to the tokens and carries the checkpoint's LoRA; `model` stays as it is.

    Raises ValueError for a model that the checkpoint was not made for and for tokens of another checkpoint.
    """
    checkpoint = easyref.model.checkpoint
    require_fit(describe(model), cross_attention_widths(model), checkpoint.widths)
    easyref.require_own(tokens)
    patched = model.clone()
    if weight and start_percent < end_percent:
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        window = to_sigma(start_percent) if start_percent > 0 else math.inf, to_sigma(end_percent)
        _inject(patched, Injection(easyref.key_values(tokens), weight, window), checkpoint.sites)
    if lora_strength:
        _add_lora(patched, easyref, lora_strength)
    return patched


def cross_attention_widths(model: ModelPatcher) -> dict[Site, int]:
    """Width of the attention at each cross-attention site of the model's UNet; empty for other architectures."""
    # the UNet itself, not get_model_object's: torch.compile puts a wrapper in its place that names modules otherwise
    modules = model.model.diffusion_model.named_modules()
    found = {parse_comfy(name): module for name, module in modules if name.endswith(".attn2")}
    return {site: module.to_k.out_features for site, module in found.items() if site}


def describe(model: ModelPatcher) -> str:
    config = getattr(model.model, "model_config", None)
    return f"The MODEL ({type(config or model.model).__name__})"


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """The host's own cross-attention, as it runs where nothing is patched."""
    return optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
    )


def _inject(model: ModelPatcher, injection: Injection, sites: tuple[Site, ...]) -> None:
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for position, site in enumerate(sites):
        previous = replaced.get(tuple(site), replaced.get((site.block, site.number)))
        model.set_model_attn2_replace(SitePatch(injection.id, position, previous), *site)
    attached = model.get_attachment(KEY) or Attached()
    attached = dataclasses.replace(attached, injections=(*attached.injections, injection))
    model.set_attachments(KEY, attached)
    for kind, wrapper in (
        (WrappersMP.PREDICT_NOISE, name_conditionings),
        (WrappersMP.CALC_COND_BATCH, announce_step),
        (WrappersMP.DIFFUSION_MODEL, _Handout(attached.injections)),
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    for kind, callback in ((CallbacksMP.ON_CLONE, _own_additions), (CallbacksMP.ON_CLEANUP, _release)):
        model.remove_callbacks_with_key(kind, KEY)
        model.add_callback_with_key(kind, KEY, callback)


def _add_lora(model: ModelPatcher, easyref: HostedEasyRef, strength: float) -> None:
    """Add the checkpoint's LoRA through the host's loader; of several requests the strongest counts, once."""
    lora = {f"unet.{name}": tensor for name, tensor in easyref.model.checkpoint.lora().items()}
    attached = model.get_attachment(KEY) or Attached()
    strengths = dict(attached.lora)
    present = strengths.get(easyref.model.fingerprint, 0.0)
    if not lora or strength <= present:
        return
    patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model.model, {}))
    merged_before = model.patches_uuid
    placed = model.add_patches(patches, strength - present)
    if len(placed) != len(lora) // 2:
        raise ValueError(
            f"{describe(model)} took {len(placed)} of the {len(lora) // 2} matrices of the checkpoint's attention LoRA. "
            "Its attention layers are not SDXL's; use an SDXL model, or set lora_strength to 0."
        )
    # The same LoRA on the same weights has the same name, so that a run that only changes the weight, the window or the
    # tokens finds it merged already; the host's own name would be new each time.
    model.patches_uuid = uuid.uuid5(merged_before, f"{easyref.model.fingerprint} {strength}")
    strengths[easyref.model.fingerprint] = strength
    model.set_attachments(KEY, dataclasses.replace(attached, lora=tuple(strengths.items())))


class _Handout:
    """Wrapper of the UNet call: gives the sites the injections that act at this sigma, one row per run of the batch."""

    def __init__(self, injections: tuple[Injection, ...]) -> None:
        self.injections = injections

    def __call__(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        unconditional = unconditional_runs(options)
        sigma = options[SIGMA] if SIGMA in options else read_sigma(options.get("sigmas"))
        acting = {
            injection.id: (injection.at(x.device, x.dtype, unconditional), injection.weight)
            for injection in self.injections
            if injection.acts(sigma)
        }
        replaced = options.get("patches_replace", {}).get("attn2", {})
        whole_blocks = {address: patch for address, patch in replaced.items() if len(address) == 2}
        options[STEP] = Step(sigma, acting, whole_blocks)
        return executor(x, timesteps, context, y, control, options, **kwargs)


def _own_additions(_: ModelPatcher, clone: ModelPatcher) -> None:
    """ON_CLONE: what is `.add`ed to a clone's patches must not reach the model it was cloned from."""
    replaced = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for site, patch in replaced.items():
        if isinstance(patch, SitePatch):
            replaced[site] = dataclasses.replace(patch, added=list(patch.added))


def _release(model: ModelPatcher) -> None:
    """ON_CLEANUP: give back the device's copies of K and V when sampling ends."""
    for injection in model.get_attachment(KEY).injections:
        injection.release()
