"""Attachments, wrappers, callbacks and patches of a ModelPatcher; no other module sets them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import comfy.lora

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor


class CopyByReference:
    """Mixin of objects that refer to tensors or weights: `copy` and `deepcopy` return the object itself."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> Any:
        return self


def attach(
    model: ModelPatcher,
    key: str,
    attachment: Any = None,
    wrappers: Mapping[str, Callable[..., Any]] | None = None,
    callbacks: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Set an attachment, and wrappers and callbacks by kind, in place of those under the key."""
    if attachment is not None:
        model.set_attachments(key, attachment)
    for kind, wrapper in (wrappers or {}).items():
        model.remove_wrappers_with_key(kind, key)
        model.add_wrapper_with_key(kind, key, wrapper)
    for kind, callback in (callbacks or {}).items():
        model.remove_callbacks_with_key(kind, key)
        model.add_callback_with_key(kind, key, callback)


def attn2_replacements(model: ModelPatcher) -> dict[tuple, Any]:
    """The replacements of the cross-attentions, by (block, number, index) or (block, number)."""
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})


def replace_attn2(model: ModelPatcher, patches: Mapping[tuple, Any]) -> None:
    """Set replacements of cross-attentions, by the same addresses."""
    for address, patch in patches.items():
        model.set_model_attn2_replace(patch, *address)


def add_lora(model: ModelPatcher, lora: Mapping[str, Tensor], strength: float, name: str) -> None:
    """Add a LoRA to the model's weights through the host's loader.

    lora: tensors by their names in diffusers' UNet. name: identifies the total of what this LoRA adds. Raises
    ValueError where the model lacks some of its layers.
    """
    loaded = comfy.lora.load_lora(
        {f"unet.{key}": tensor for key, tensor in lora.items()},
        comfy.lora.model_lora_keys_unet(model.model, {}),
    )
    uuid_below = model.patches_uuid
    matrices, patched = len(lora) // 2, model.add_patches(loaded, strength)
    if len(patched) != matrices:
        raise ValueError(
            f"{describe(model)} took {len(patched)} of the {matrices} matrices of the checkpoint's attention "
            "LoRA. Its attention layers are not SDXL's. Use an SDXL model, or set lora_strength to 0."
        )
    # The host merges again whenever this name changes, and its own name would be new in every run. The same
    # LoRA on the same weights has the same name, so a run that changes only weight, window or tokens merges
    # nothing.
    model.patches_uuid = uuid.uuid5(uuid_below, name)


def describe(model: ModelPatcher) -> str:
    config = getattr(model.model, "model_config", None)
    return f"The MODEL ({type(config or model.model).__name__})"
