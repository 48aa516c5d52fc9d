"""Conditioning of a MODEL on reference tokens, by patches and wrappers of its ModelPatcher.

One Apply node adds one Injection, stored in the patcher's attachment. At every UNet call a wrapper
(step_wrapper.py) passes the active injections to the attention sites in transformer_options; the SitePatch at
each site adds its injection's term. model_options therefore holds 70 addresses and no tensor.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...easyref_core.unet.layer_weights import (
    DEFAULT_BRANCHES,
    LINEAR,
    BranchTokens,
    layers_of,
    resolve_weight_type,
)
from ...easyref_core.unet.layout import Site, parse_comfy, require_fit
from ...easyref_core.unet.reference_attention import V_ONLY, require_scaling
from ...easyref_core.unet.weight_schedule import parse_schedule
from ..host.attach import add_lora, attach, attn2_replacements, describe, replace_attn2
from .cond_roles import record_cond_roles
from .injection import Injection, Strength
from .memory import MemoryWrapper
from .site_patch import SitePatch
from .step_wrapper import KEY, StepWrapper, publish_step
from .sub_batch import SubBatchWrapper

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ...easyref_core.unet.layer_weights import WeightType
    from ..host.hosted_model import HostedEasyRef
    from ..host.socket_types import TokenPair


@dataclasses.dataclass(frozen=True)
class Attachment:
    """EasyRef's attachment of a ModelPatcher: replaced when a node adds to it, never modified."""

    injections: tuple[Injection, ...] = ()
    lora: tuple[tuple[str, float], ...] = ()  # (checkpoint fingerprint, strength)
    sites: frozenset[tuple[int, Site]] = frozenset()  # Apply node and site of every SitePatch


@dataclasses.dataclass(frozen=True)
class ApplySettings:
    """Settings of Apply EasyRef.

    start_percent, end_percent: fractions of the sampling. mask: (frames, height, width) or (height, width),
    of any size; it covers the latent. weight_type, layer_weights: see layer_weights.py; weight_schedule:
    weight_schedule.py; embeds_scaling: reference_attention.py.
    """

    weight: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    lora_strength: float = 1.0
    mask: Tensor | None = None
    weight_type: str = LINEAR
    layer_weights: str = ""
    weight_schedule: str = ""
    embeds_scaling: str = V_ONLY

    @property
    def has_effect(self) -> bool:
        """True if the weight is not 0, the window is not empty and the mask is not all zero."""
        masked_out = self.mask is not None and not self.mask.any()
        return bool(self.weight) and self.start_percent < self.end_percent and not masked_out


def condition(
    model: ModelPatcher, easyref: HostedEasyRef, tokens: TokenPair, settings: ApplySettings
) -> ModelPatcher:
    """A clone of `model` that attends to the tokens and has the checkpoint's LoRA; `model` is not modified.

    Raises ValueError for a model that does not fit the checkpoint, for tokens of another checkpoint, and for
    invalid settings.
    """
    checkpoint = easyref.model.checkpoint
    require_fit(describe(model), cross_attention_widths(model), checkpoint.widths)
    easyref.require_same_checkpoint(tokens)
    chosen = resolve_weight_type(settings.weight_type, settings.layer_weights)
    window = settings.start_percent, settings.end_percent
    points = tuple(parse_schedule(settings.weight_schedule, *window))
    require_scaling(settings.embeds_scaling)
    patched = model.clone()
    if settings.has_effect and any(chosen.factors):
        factors, branches = _per_site(checkpoint.sites, chosen)
        strength = Strength(settings.weight, window, factors, points, settings.embeds_scaling)
        mask = settings.mask
        mask = None if mask is None else mask.detach().cpu().reshape(-1, *mask.shape[-2:])
        injection = Injection(easyref.key_value_rows(tokens), strength, branches, mask)
        _add_injection(patched, injection, checkpoint.sites)
    if settings.lora_strength:
        _strengthen_lora(patched, easyref, settings.lora_strength)
    if patched.get_attachment(KEY):
        easyref.clear_caches_on_detach(patched)
    return patched


def cross_attention_widths(model: ModelPatcher) -> dict[Site, int]:
    """Width of each cross-attention of the model's UNet, by site; empty for other architectures."""
    # the UNet itself, not get_model_object's: torch.compile replaces that by a wrapper with other module
    # names
    modules = model.model.diffusion_model.named_modules()
    attentions = {parse_comfy(name): module for name, module in modules if name.endswith(".attn2")}
    return {site: module.to_k.out_features for site, module in attentions.items() if site}


def _per_site(
    sites: tuple[Site, ...], chosen: WeightType
) -> tuple[tuple[float, ...], tuple[BranchTokens, ...]]:
    """Factor and BranchTokens of each site."""
    if chosen == resolve_weight_type(LINEAR):  # needs no layers, so it fits UNets without SDXL's
        return (1.0,) * len(sites), (DEFAULT_BRANCHES,) * len(sites)
    layers = layers_of(sites)
    return tuple(
        tuple(values[layers[site]] for site in sites) for values in (chosen.factors, chosen.branch_tokens)
    )


def _add_injection(model: ModelPatcher, injection: Injection, sites: tuple[Site, ...]) -> None:
    attachment = model.get_attachment(KEY) or Attachment()
    slot, replaced = len(attachment.injections), attn2_replacements(model)
    patches = [
        SitePatch(slot, position, site, replaced.get(tuple(site), replaced.get((site.block, site.number))))
        for position, site in enumerate(sites)
        if injection.strength.factors[position]
    ]
    # one patch is enough to have the projections loaded
    patches[0] = dataclasses.replace(patches[0], model=injection.key_values.model)
    replace_attn2(model, {tuple(patch.site): patch for patch in patches})
    sites_of_slot = frozenset((slot, patch.site) for patch in patches)
    attach_injections(
        model,
        dataclasses.replace(
            attachment,
            injections=(*attachment.injections, injection),
            sites=attachment.sites | sites_of_slot,
        ),
    )


def attach_injections(model: ModelPatcher, attachment: Attachment) -> None:
    """Replace the model's attachment, and its wrappers and callbacks by those for these injections."""
    injections = attachment.injections
    step = StepWrapper(injections, model.get_model_object("model_sampling"), attachment.sites)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: SubBatchWrapper(max(injection.rows for injection in injections)),
        WrappersMP.PREPARE_SAMPLING: MemoryWrapper(injections),
        WrappersMP.PREDICT_NOISE: record_cond_roles,
        WrappersMP.CALC_COND_BATCH: publish_step,
        WrappersMP.APPLY_MODEL: step.apply_model,
        WrappersMP.DIFFUSION_MODEL: step.diffusion_model,
    }
    callbacks = {CallbacksMP.ON_CLONE: _copy_site_patches, CallbacksMP.ON_CLEANUP: _release}
    attach(model, KEY, attachment, wrappers, callbacks)


def _strengthen_lora(model: ModelPatcher, easyref: HostedEasyRef, strength: float) -> None:
    """Raise its LoRA: chained Apply nodes of one checkpoint use the maximum strength, not the sum."""
    lora, fingerprint = easyref.model.checkpoint.lora(), easyref.model.fingerprint
    attachment = model.get_attachment(KEY) or Attachment()
    strengths = dict(attachment.lora)
    present = strengths.get(fingerprint, 0.0)
    if not lora or strength <= present:
        return
    add_lora(model, lora, strength - present, f"{fingerprint} {strength}")
    strengths[fingerprint] = strength
    attach(model, KEY, dataclasses.replace(attachment, lora=tuple(strengths.items())))


def _copy_site_patches(_: ModelPatcher, clone: ModelPatcher) -> None:
    """ON_CLONE callback: what other packs add to a clone's patches must not reach the original."""
    patches = attn2_replacements(clone).items()
    replace_attn2(clone, {at: patch.copy() for at, patch in patches if isinstance(patch, SitePatch)})


def _release(model: ModelPatcher) -> None:
    """ON_CLEANUP callback: release the device's copies of K and V when sampling ends."""
    for injection in model.get_attachment(KEY).injections:
        injection.release()
