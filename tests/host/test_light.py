"""What is left of EasyRef while the UNet runs: no graph break, nothing of the LoRA, no new memory, nothing outside the window."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from devkit.host import golden
from devkit.host.sampling import predict

from .test_unet_patch import SITES, rows_of_two_sides


def prepared(easy, model, **settings) -> tuple:
    """One site of a patched model, and what the host gives it in a step: q, k, v and extra_options."""
    injection = golden.part(easy.pack, "nodes.unet_patch.injection")
    patched = easy.apply(model, **settings)
    site = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    (injected,) = patched.get_attachment("easyref").injections
    layout = rows_of_two_sides(easy.pack)
    q, k, v = (torch.randn(2, tokens, 32) for tokens in (16, 77, 77))
    place = injection.Place(model.get_model_object("model_sampling"), q.device, q.dtype)
    step = injection.Step(1.0, {site.slot: injected.at(1.0, layout, place)}, layout)
    return site, (q, k, v), {injection.STEP: step, "n_heads": 2, "activations_shape": (2, 32, 4, 4)}


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5}, {"mask": torch.ones(1, 8, 8)}])
def test_site_breaks_no_graph(easy, model, settings: dict) -> None:
    site, qkv, options = prepared(easy, model, **settings)
    # the host's own attention is its own matter
    plain = dataclasses.replace(site, previous=lambda q, k, v, _: q * 2)
    with torch.no_grad():
        torch._dynamo.reset()
        explained = torch._dynamo.explain(lambda q, k, v: plain(q, k, v, options))(*qkv)
        compiled = torch.compile(lambda q, k, v: plain(q, k, v, options), backend="aot_eager", fullgraph=True)
        assert golden.error(compiled(*qkv), plain(*qkv, options)) <= 1e-6
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_weight_1_multiplies_nothing_and_the_sum_takes_no_new_memory(easy, model) -> None:
    """One attention, one addition in place."""
    site, qkv, options = prepared(easy, model)
    text = torch.randn(2, 16, 32)
    plain = dataclasses.replace(site, previous=lambda *_: text)
    before = text.clone()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain(*qkv, options)
    ran = {event.key: event.count for event in profile.key_averages()}
    made = (
        "aten::mul",
        "aten::add",
        "aten::copy_",
        "aten::clone",
        "aten::repeat",
        "aten::cat",
        "aten::_to_copy",
    )
    assert not ran.keys() & set(made), ran
    assert ran["aten::scaled_dot_product_attention"] == ran["aten::add_"] == 1
    assert torch.equal(text, before)


def test_nothing_of_the_lora_runs_while_sampling(easy, model) -> None:
    """It is merged into the weights: no hook and no weight function at any attention's layers."""
    patched = easy.apply(model)
    predict(patched)
    unet = patched.model.diffusion_model
    layers = [
        module for name, module in unet.named_modules() if ".attn" in name and hasattr(module, "weight")
    ]
    assert len(layers) >= 8 * SITES
    for layer in layers:
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        assert not getattr(layer, "weight_function", None)
        assert not getattr(layer, "bias_function", None)
        assert "forward" not in vars(layer)


def test_nothing_is_computed_outside_the_window(easy, model) -> None:
    patched = easy.apply(model, end=0.5, lora=0.0)
    sigma = model.get_model_object("model_sampling").percent_to_sigma(0.9)
    counts = []
    for one in (model, patched):
        with FlopCounterMode(display=False) as operations:
            answer = predict(one, sigma)
        counts.append((operations.get_total_flops(), answer))
    assert counts[0][0] == counts[1][0]
    assert torch.equal(counts[0][1], counts[1][1])
