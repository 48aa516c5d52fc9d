"""Loading under the host's dynamic VRAM, whose layers have no weights until they are loaded (its switch simulated)."""

from __future__ import annotations

import comfy.memory_management
import torch

from devkit.host import golden


def test_every_weight_arrives_and_tokens_are_the_authors(pack, monkeypatch) -> None:
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    easyref = golden.load(pack)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False)  # there is no GPU to page to
    modules = [*easyref.model.mllm.modules(), *easyref.model.kv.modules()]
    assert not [
        module for module in modules if hasattr(module, "comfy_cast_weights") and module.weight is None
    ]
    with torch.inference_mode():
        tokens = golden.tokens(pack, easyref)
    assert golden.error(tokens.conditional, golden.expected()["cond.reference_embeds"]) <= 1e-5


def test_no_weight_is_outside_the_layers_that_page(pack) -> None:
    """A parameter or buffer on a module of our own would be loaded whole, or left on the CPU."""
    easyref = golden.load(pack)
    for patcher in easyref.get_models():
        for name, module in patcher.model.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            assert not own or hasattr(module, "comfy_cast_weights"), name
