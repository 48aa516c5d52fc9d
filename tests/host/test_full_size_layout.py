"""The released checkpoint's layout against ComfyUI's own full-size models, on the meta device: shapes, no memory.

Pinned: the 70 cross-attentions of SDXL (and of its inpainting variant) are those the checkpoint was made for, at the
right addresses; its 560 LoRA matrices land by their own names; other architectures are refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import comfy.lora
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from devkit.host import golden
from devkit.host.full_size_unets import FLUX, REFINER, SD15, SDXL, SSD_1B, on_meta

TOKENS = SimpleNamespace(conditional=torch.empty(1), unconditional=torch.empty(1))  # one row for each side
RELEASED = json.loads((golden.GOLDEN / "released_layout.json").read_text())


@pytest.fixture(scope="module")
def sdxl() -> ModelPatcher:
    return on_meta(SDXL)


@pytest.fixture(scope="module")
def released(pack) -> SimpleNamespace:
    """The part of a hosted EasyRef that the UNet patch uses, at the released sizes."""
    formats = golden.part(pack, "easyref_core.checkpoint.formats")
    shapes = RELEASED["keys"]
    named = formats.translate(shapes, formats.EASYREF_NAMES)
    sites, numbered = formats.number_sites({new: shapes[stored] for stored, new in named.items()})
    widths = [numbered[f"kv.to_k_ip.{i}.weight"][0] for i in range(len(sites))]
    lora = {
        n.removeprefix("unet."): torch.empty(s, device="meta") for n, s in shapes.items() if "_lora." in n
    }
    checkpoint = SimpleNamespace(
        sites=tuple(sites), widths=dict(zip(sites, widths, strict=True)), lora=lambda: dict(lora)
    )
    key_values = [(torch.empty(2, 64, width, device="meta"),) * 2 for width in widths]
    model = SimpleNamespace(checkpoint=checkpoint, fingerprint="released")
    return SimpleNamespace(
        model=model,
        key_value_rows=lambda tokens: golden.part(pack, "nodes.host.key_values").KeyValueTable(key_values, 1),
        require_same_checkpoint=lambda tokens: None,
        forget_with=lambda model: None,
    )


def apply(pack: Any, model: ModelPatcher, released: SimpleNamespace) -> ModelPatcher:
    unet_patch = golden.part(pack, "nodes.unet_patch.condition")
    return unet_patch.condition(model, released, TOKENS, unet_patch.ApplySettings())


def test_cross_attentions_are_those_of_the_checkpoint(pack, sdxl, released) -> None:
    found = golden.part(pack, "nodes.unet_patch.condition").cross_attention_widths(sdxl)
    assert Counter(found.values()) == {640: 10, 1280: 60}
    assert found == released.model.checkpoint.widths


def test_sites_are_numbered_as_the_authors_number_them(released) -> None:
    order = [f"{site.diffusers}.attn2.processor" for site in released.model.checkpoint.sites]
    assert order == [name for name in RELEASED["attn_processor_order"] if ".attn2." in name]


def test_host_has_a_block_at_each_address(released, sdxl) -> None:
    modules = dict(sdxl.model.diffusion_model.named_modules())
    missing = [site for site in released.model.checkpoint.sites if f"{site.comfy}.attn2" not in modules]
    assert not missing


@pytest.mark.parametrize("in_channels", [4, 8, 9])
def test_sdxl_and_its_editing_and_inpainting_variants_fit(pack, released, in_channels: int) -> None:
    patched = apply(pack, on_meta(SDXL | {"in_channels": in_channels}), released)
    replaced = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert set(replaced) == {tuple(site) for site in released.model.checkpoint.sites}
    assert len(patched.patches) == 560


@pytest.fixture(scope="module")
def lora_by_weight(sdxl, released) -> dict[str, Any]:
    """{weight of the host's model: LoRA}, loaded under the names in the released file, by the host alone."""
    names = {f"unet.{name}": tensor for name, tensor in released.model.checkpoint.lora().items()}
    return comfy.lora.load_lora(names, comfy.lora.model_lora_keys_unet(sdxl.model, {}))


def test_560_lora_matrices_find_their_weights(lora_by_weight) -> None:
    attentions = Counter(name.split(".")[-3 if ".to_out." not in name else -4] for name in lora_by_weight)
    assert attentions == {"attn1": 280, "attn2": 280}


def test_each_lora_has_the_shape_of_its_weight(sdxl, lora_by_weight) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in sdxl.model.state_dict().items()}
    wrong = [
        name
        for name, lora in lora_by_weight.items()
        if (lora.weights[0].shape[0], lora.weights[1].shape[1]) != shapes[name]
        or lora.weights[0].shape[1] != lora.weights[1].shape[0]
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("unet_config", "named"),
    [
        (SD15, r"MODEL \(SD15\) .* 16 cross-attentions"),
        (REFINER, r"MODEL \(SDXLRefiner\) .* 44 cross-attentions"),
        (SSD_1B, r"MODEL \(SSD1B\) .* 34 cross-attentions"),
        (FLUX, r"MODEL \(Flux\) .* no cross-attentions of Stable Diffusion's kind"),
    ],
)
def test_other_models_are_refused_by_name(pack, released, unet_config: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*70 cross-attentions.*Use the kind of model"):
        apply(pack, on_meta(unet_config), released)


def test_sdxl_of_the_right_number_but_another_width_is_refused(pack, released) -> None:
    with pytest.raises(ValueError, match="60 x 1536 wide"):
        apply(pack, on_meta(SDXL | {"model_channels": 384}), released)
