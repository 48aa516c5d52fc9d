"""Cost of EasyRef while the UNet runs: no graph break, no new memory, nothing outside the window."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from devkit.host import golden
from devkit.host.sampling import predict


def prepared(easy, model, **settings) -> tuple:
    """One site of a patched model, and its arguments in a step: q, k, v and extra_options."""
    step = golden.part(easy.pack, "nodes.unet_patch.step")
    patched = easy.apply(model, **settings)
    site = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    (injected,) = patched.get_attachment("easyref").injections
    layout = easy.two_sided_layout()
    q, k, v = (torch.randn(2, tokens, 32) for tokens in (16, 77, 77))
    call = step.UNetCall(model.get_model_object("model_sampling"), q.device, q.dtype)
    state = step.Step(1.0, {site.slot: injected.active_at(1.0, layout, call)}, layout)
    return site, (q, k, v), {step.STEP: state, "n_heads": 2, "activations_shape": (2, 32, 4, 4)}


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5}, {"mask": torch.ones(1, 8, 8)}])
def test_site_breaks_no_graph(easy, model, settings: dict) -> None:
    site, qkv, options = prepared(easy, model, **settings)
    # without the host's attention, which may break graphs
    plain = dataclasses.replace(site, previous=lambda q, k, v, _: q * 2)
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(lambda q, k, v: plain(q, k, v, options), backend="aot_eager", fullgraph=True)
        assert golden.error(compiled(*qkv), plain(*qkv, options)) <= 1e-6


def test_weight_1_multiplies_nothing_and_the_sum_takes_no_new_memory(easy, model) -> None:
    """One attention, one addition in place."""
    site, qkv, options = prepared(easy, model)
    text = torch.randn(2, 16, 32)
    plain = dataclasses.replace(site, previous=lambda *_: text)
    before = text.clone()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain(*qkv, options)
    ran = {event.key: event.count for event in profile.key_averages()}
    allocating = {f"aten::{name}" for name in "mul add copy_ clone repeat cat _to_copy".split()}
    assert not ran.keys() & allocating, ran
    assert ran["aten::scaled_dot_product_attention"] == ran["aten::add_"] == 1
    assert torch.equal(text, before)


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
