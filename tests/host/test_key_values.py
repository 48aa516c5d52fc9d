"""K and V of many rows of tokens: projected for the rows that are sampled, with the image of those that are
held.
"""

from __future__ import annotations

import inspect
from typing import Any

import comfy.context_windows as windows
import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from devkit.host import golden
from devkit.host.sampling import cfg_guider, sample
from devkit.host.tiny_nodes.tiny_sdxl import random_conditioning

from .test_apply_settings import batched_tokens

FRAMES, WINDOW = 6, 2


def in_windows(model: ModelPatcher) -> ModelPatcher:
    """Sampled as a video, some frames at a time."""
    clone = model.clone()
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
        context_length=WINDOW,
        context_overlap=0,
    )
    return clone


def sampled(model: ModelPatcher, **how: Any) -> torch.Tensor:
    guider = cfg_guider(model, random_conditioning(1, 77), random_conditioning(2, 77))
    return sample(guider, batch=FRAMES, **how)


@pytest.fixture
def none_held(pack, monkeypatch) -> None:
    """As if all K and V were too large to be held."""
    monkeypatch.setattr(golden.part(pack, "nodes.host.hosted_model"), "MAX_TABLE_BYTES", 0)


def applied(easy: Any, model: ModelPatcher, **settings: Any) -> ModelPatcher:
    return easy.apply(model, tokens=batched_tokens(easy, FRAMES)[0], lora=0.0, **settings)


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5, "weight_type": "style transfer precise"}])
def test_projected_rows_are_the_held_rows_bit_for_bit(easy, model, monkeypatch, settings: dict) -> None:
    held = sampled(in_windows(applied(easy, model, **settings)))
    monkeypatch.setattr(golden.part(easy.pack, "nodes.host.hosted_model"), "MAX_TABLE_BYTES", 0)
    projected = in_windows(applied(easy, model, **settings))
    assert torch.equal(sampled(projected), held)
    assert golden.error(held, sampled(in_windows(easy.apply(model, lora=0.0, **settings)))) > 1e-2


def test_rows_of_a_window_alone_are_on_the_device(easy, model, none_held, monkeypatch) -> None:
    rows = golden.part(easy.pack, "nodes.host.key_values").KeyValueProjector
    taken, take = [], rows.take
    monkeypatch.setattr(
        rows, "take", lambda self, numbers, *place: taken.append(list(numbers)) or take(self, numbers, *place)
    )
    sampled(in_windows(applied(easy, model)), steps=1)
    anchored = "causal_window_fix" in inspect.signature(windows.IndexListContextHandler).parameters
    # Of each window, after the one unconditional row. Newer hosts sample the frame before a window with it.
    assert taken == (
        [[0, 1, 2], [0, 2, 3, 4], [0, 4, 5, 6]] if anchored else [[0, 1, 2], [0, 3, 4], [0, 5, 6]]
    )


def test_projections_are_loaded_with_the_unet(easy, model, none_held) -> None:
    patched, loaded = applied(easy, model), []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.extend(one.model.model for one in mm.current_loaded_models if one.currently_used)
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("diffusion_model", "look", look)
    sampled(patched.clone(), steps=1)
    assert any(module is easy.easyref.model.kv for module in loaded)


def test_the_projections_are_loaded_once_for_a_chain_and_for_several_devices(easy, model, none_held) -> None:
    """As models of the patches, of which the host makes no copies for other devices."""
    twice = applied(easy, applied(easy, model))
    assert {id(one) for one in twice.model_patches_models()} == {id(easy.easyref.get_models()[1])}
    assert not twice.get_additional_models()


def test_held_rows_load_nothing_with_the_unet(easy, model) -> None:
    assert not applied(easy, model).model_patches_models()


def test_the_host_is_told_the_memory(easy, model, monkeypatch) -> None:
    """Room for K and V of both sides of the latents that are sampled at a time, to one latent's
    activations.
    """
    asked, load = [], mm.load_models_gpu

    def ask(*models: Any, **how: Any) -> None:
        asked.append(how.get("minimum_memory_required", 0))
        load(*models, **how)

    monkeypatch.setattr(mm, "load_models_gpu", ask)
    latent = int(model.model.memory_required([1, 4, 16, 16]))
    patched = applied(easy, model)
    # as large as a latent's activations, so that it shows
    monkeypatch.setattr(patched.get_attachment("easyref").injections[0].key_values, "row_numel", latent)
    for prepare, frames in ((ModelPatcher.clone, FRAMES), (in_windows, WINDOW)):
        told = []
        for one in (model, patched):
            asked.clear()
            sampled(prepare(one), steps=1)
            told.append(max(asked))
        needed = (2 * frames + FRAMES + 1) * latent * 4  # and all rows, from which a window is selected
        assert needed <= told[1] - told[0] <= needed + latent
