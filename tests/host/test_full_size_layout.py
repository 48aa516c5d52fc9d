"""The released checkpoint's layout against ComfyUI's own full-size models, on the meta device.

Pinned: the 70 cross-attentions of SDXL (and of its inpainting variant) are those of the checkpoint, at the
right addresses; its 560 LoRA matrices are found by their own names; other architectures are refused by name.
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
    """The part of a loaded EasyRef that unet_patch uses, at the released sizes."""
    formats = golden.part(pack, "easyref_core.checkpoint.formats")
    shapes = RELEASED["keys"]
    named = formats.translate(shapes, formats.EASYREF_NAMES)
    sites, numbered = formats.number_sites({new: shapes[stored] for stored, new in named.items()})
    widths = [numbered[f"kv.to_k_ip.{i}.weight"][0] for i in range(len(sites))]
    lora = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if "_lora." in name}
    checkpoint = SimpleNamespace(
        sites=tuple(sites),
        widths=dict(zip(sites, widths, strict=True)),
        lora=lambda: {name.removeprefix("unet."): tensor for name, tensor in lora.items()},
    )
    key_values = [(torch.empty(2, 64, width, device="meta"),) * 2 for width in widths]
    model = SimpleNamespace(checkpoint=checkpoint, fingerprint="released")
    return SimpleNamespace(
        model=model,
        key_value_rows=lambda tokens: golden.part(pack, "nodes.host.key_values").KeyValueTable(key_values, 1),
        require_same_checkpoint=lambda tokens: None,
        clear_caches_on_detach=lambda model: None,
    )


def apply(pack: Any, model: ModelPatcher, released: SimpleNamespace) -> ModelPatcher:
    unet_patch = golden.part(pack, "nodes.unet_patch.condition")
    return unet_patch.condition(model, released, TOKENS, unet_patch.ApplySettings())


def test_cross_attentions_are_those_of_the_checkpoint(pack, sdxl, released) -> None:
    found = golden.part(pack, "nodes.unet_patch.condition").cross_attention_widths(sdxl)
    assert Counter(found.values()) == {640: 10, 1280: 60}
    assert found == released.model.checkpoint.widths


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
    for name, lora in lora_by_weight.items():
        up, down = (weight.shape for weight in lora.weights[:2])
        assert (up[0], down[1]) == shapes[name], name
        assert up[1] == down[0], name


@pytest.mark.parametrize(
    ("unet_config", "named"),
    [
        (SD15, r"\(SD15\) does .* 16 cross-attentions \(5 x 320 wide, 5 x 640 wide, 6 x 1280 wide\)"),
        (REFINER, r"\(SDXLRefiner\) does .* 44 cross-attentions \(20 x 768 wide, 24 x 1536 wide\)"),
        (SSD_1B, r"\(SSD1B\) does .* 34 cross-attentions"),
        (FLUX, r"\(Flux\) does .* no cross-attentions of Stable Diffusion's kind"),
    ],
)
def test_other_models_are_refused_by_name(pack, released, unet_config: dict, named: str) -> None:
    tokens = golden.part(pack, "nodes.host.socket_types").TokenPair(**vars(TOKENS), easyref=released)
    inputs = on_meta(unet_config), tokens, 1.0, 0.0, 1.0, 1.0
    with pytest.raises(ValueError, match=rf"^The MODEL {named}") as refused:
        golden.execute(pack, "EasyRefApply", *inputs)
    for part in (
        "does not fit",
        "made for 70 cross-attentions",
        "needs an SDXL base model",
        "Use the kind of model",
    ):
        assert part in str(refused.value)


def test_sdxl_of_the_right_number_but_another_width_is_refused(pack, released) -> None:
    with pytest.raises(ValueError, match="60 x 1536 wide"):
        apply(pack, on_meta(SDXL | {"model_channels": 384}), released)
