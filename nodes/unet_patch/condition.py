"""How the reference term enters ComfyUI's UNet: the only file that touches a ModelPatcher's patches.

One Apply node is one Injection: K and V of its tokens, how strongly they act where and when, and a mask. It
is kept in the patcher's attachments. At every UNet call a wrapper (step_wrapper.py) hands the injections that
act to the attention sites, in transformer_options; the SitePatch at each site adds its injection's term. So
model_options holds 70 addresses and no tensor.
"""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING

import comfy.lora
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...easyref_core.unet.layer_weights import LINEAR, OWN, BranchTokens, choose, layers_of
from ...easyref_core.unet.layout import Site, parse_comfy, require_fit
from ...easyref_core.unet.reference_attention import V_ONLY, require_scaling
from ...easyref_core.unet.weight_schedule import parse_schedule
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
class Attached:
    """What EasyRef has added to one model: an attachment of the patcher, replaced as a whole, never edited."""

    injections: tuple[Injection, ...] = ()
    lora: tuple[tuple[str, float], ...] = ()  # (checkpoint fingerprint, strength)
    sites: frozenset[tuple[int, Site]] = frozenset()  # Apply node and site of every SitePatch


@dataclasses.dataclass(frozen=True)
class ApplySettings:
    """Settings of Apply EasyRef.

    start_percent, end_percent: fractions of the sampling. mask: (frames, height, width) or (height, width),
    of any size; it covers the latent. weight_type, layer_weights: see layer_weights.py; weight_schedule:
    schedule.py; embeds_scaling: attention.py.
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
    def acts(self) -> bool:
        """Whether there is a weight, a window and a part of the mask in which the references act."""
        masked_out = self.mask is not None and not self.mask.any()
        return bool(self.weight) and self.start_percent < self.end_percent and not masked_out


def condition(
    model: ModelPatcher, easyref: HostedEasyRef, tokens: TokenPair, settings: ApplySettings
) -> ModelPatcher:
    """A clone of `model` that attends to the tokens and carries the checkpoint's LoRA; `model` stays as it
    is.

    Raises ValueError for a model that the checkpoint was not made for, for tokens of another checkpoint, and
    for settings that cannot be read.
    """
    checkpoint = easyref.model.checkpoint
    require_fit(describe(model), cross_attention_widths(model), checkpoint.widths)
    easyref.require_same_checkpoint(tokens)
    chosen = choose(settings.weight_type, settings.layer_weights)
    window = settings.start_percent, settings.end_percent
    points = tuple(parse_schedule(settings.weight_schedule, *window))
    require_scaling(settings.embeds_scaling)
    patched = model.clone()
    if settings.acts and any(chosen.factors):
        factors, sides = _of_sites(checkpoint.sites, chosen)
        strength = Strength(settings.weight, window, factors, points, settings.embeds_scaling)
        mask = settings.mask
        mask = None if mask is None else mask.detach().cpu().reshape(-1, *mask.shape[-2:])
        injection = Injection(easyref.key_value_rows(tokens), strength, sides, mask)
        _inject(patched, injection, checkpoint.sites)
    if settings.lora_strength:
        _add_lora(patched, easyref, settings.lora_strength)
    if patched.get_attachment(KEY):
        easyref.forget_with(patched)
    return patched


def cross_attention_widths(model: ModelPatcher) -> dict[Site, int]:
    """Width of the attention at each cross-attention site of the model's UNet; empty for other architectures."""
    # the UNet itself, not get_model_object's: torch.compile puts a wrapper in its place that names modules
    # otherwise
    modules = model.model.diffusion_model.named_modules()
    found = {parse_comfy(name): module for name, module in modules if name.endswith(".attn2")}
    return {site: module.to_k.out_features for site, module in found.items() if site}


def describe(model: ModelPatcher) -> str:
    config = getattr(model.model, "model_config", None)
    return f"The MODEL ({type(config or model.model).__name__})"


def _of_sites(
    sites: tuple[Site, ...], chosen: WeightType
) -> tuple[tuple[float, ...], tuple[BranchTokens, ...]]:
    """Factor and sides of each site."""
    if chosen == choose(LINEAR):  # the same everywhere, whatever the UNet's layers are
        return (1.0,) * len(sites), (OWN,) * len(sites)
    layers = layers_of(sites)
    return tuple(
        tuple(values[layers[site]] for site in sites) for values in (chosen.factors, chosen.branch_tokens)
    )


def _inject(model: ModelPatcher, injection: Injection, sites: tuple[Site, ...]) -> None:
    attached = model.get_attachment(KEY) or Attached()
    slot = len(attached.injections)
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    loaded = injection.key_values.model
    patches = [
        SitePatch(slot, position, site, replaced.get(tuple(site), replaced.get((site.block, site.number))))
        for position, site in enumerate(sites)
        if injection.strength.factors[position]
    ]
    for i, patch in enumerate(patches):  # one is enough to have the projections loaded
        model.set_model_attn2_replace(dataclasses.replace(patch, model=None if i else loaded), *patch.site)
    added = frozenset((slot, patch.site) for patch in patches)
    attached = dataclasses.replace(
        attached, injections=(*attached.injections, injection), sites=attached.sites | added
    )
    attach(model, attached)


def attach(model: ModelPatcher, attached: Attached) -> None:
    """Make `attached` what the model's wrappers and callbacks work with."""
    model.set_attachments(KEY, attached)
    injections = attached.injections
    step = StepWrapper(injections, model.get_model_object("model_sampling"), attached.sites)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, SubBatchWrapper(max(injection.rows for injection in injections))),
        (WrappersMP.PREPARE_SAMPLING, MemoryWrapper(injections)),
        (WrappersMP.PREDICT_NOISE, record_cond_roles),
        (WrappersMP.CALC_COND_BATCH, publish_step),
        (WrappersMP.APPLY_MODEL, step.apply_model),
        (WrappersMP.DIFFUSION_MODEL, step.diffusion_model),
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
            f"{describe(model)} took {len(placed)} of the {len(lora) // 2} matrices of the checkpoint's "
            "attention LoRA. "
            "Its attention layers are not SDXL's; use an SDXL model, or set lora_strength to 0."
        )
    # The same LoRA on the same weights has the same name, so that a run that only changes the weight, the
    # window or the tokens finds it merged already; the host's own name would be new each time.
    model.patches_uuid = uuid.uuid5(merged_before, f"{easyref.model.fingerprint} {strength}")
    strengths[easyref.model.fingerprint] = strength
    model.set_attachments(KEY, dataclasses.replace(attached, lora=tuple(strengths.items())))


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
