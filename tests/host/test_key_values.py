"""K and V of many rows of tokens, projected for the rows that are sampled, against the table of all rows."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.context_windows as windows
import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from devkit.host import golden
from devkit.host.sampling import in_windows, sample_cfg

FRAMES, WINDOW = 6, 2  # in_windows samples two frames at a time


def sampled(model: ModelPatcher, **options: Any) -> torch.Tensor:
    return sample_cfg(model, batch=FRAMES, **options)


@pytest.fixture
def no_table(pack, monkeypatch) -> None:
    """As if every table of K and V were too large."""
    monkeypatch.setattr(golden.part(pack, "nodes.host.hosted_model"), "MAX_TABLE_BYTES", 0)


def applied(easy: Any, model: ModelPatcher, **settings: Any) -> ModelPatcher:
    return easy.apply(model, tokens=easy.batched_tokens(FRAMES)[0], lora=0.0, **settings)


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5, "weight_type": "style transfer precise"}])
def test_projected_rows_are_the_held_rows_bit_for_bit(easy, model, monkeypatch, settings: dict) -> None:
    held = sampled(in_windows(applied(easy, model, **settings)))
    monkeypatch.setattr(golden.part(easy.pack, "nodes.host.hosted_model"), "MAX_TABLE_BYTES", 0)
    projected = in_windows(applied(easy, model, **settings))
    assert torch.equal(sampled(projected), held)
    assert golden.error(held, sampled(in_windows(easy.apply(model, lora=0.0, **settings)))) > 1e-2


def test_rows_of_a_window_alone_are_on_the_device(easy, model, no_table, monkeypatch) -> None:
    rows = golden.part(easy.pack, "nodes.host.key_values").KeyValueProjector
    taken, select = [], rows.select

    def record(self: Any, numbers: Any, *target: Any) -> Any:
        taken.append(list(numbers))
        return select(self, numbers, *target)

    monkeypatch.setattr(rows, "select", record)
    sampled(in_windows(applied(easy, model)), steps=1)
    anchored = "causal_window_fix" in inspect.signature(windows.IndexListContextHandler).parameters
    # Of each window, after the one unconditional row. Newer hosts sample the frame before a window with it.
    frames = [[1, 2], [2, 3, 4], [4, 5, 6]] if anchored else [[1, 2], [3, 4], [5, 6]]
    assert taken == [[0, *window] for window in frames]


def test_projections_are_loaded_with_the_unet(easy, model, no_table) -> None:
    patched, loaded = applied(easy, model), []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.extend(one.model.model for one in mm.current_loaded_models if one.currently_used)
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("diffusion_model", "look", look)
    sampled(patched.clone(), steps=1)
    assert any(module is easy.easyref.model.kv for module in loaded)


def test_projections_are_loaded_once_for_a_chain_and_several_devices(easy, model, monkeypatch) -> None:
    """As models of the patches, of which the host makes no copies for other devices; a table needs none."""
    assert not applied(easy, model).model_patches_models()
    monkeypatch.setattr(golden.part(easy.pack, "nodes.host.hosted_model"), "MAX_TABLE_BYTES", 0)
    twice = applied(easy, applied(easy, model))
    assert {id(one) for one in twice.model_patches_models()} == {id(easy.easyref.get_models()[1])}
    assert not twice.get_additional_models()


def test_the_host_reserves_the_memory(easy, model, monkeypatch) -> None:
    """For K and V of both sides of the latents that are sampled at a time, up to one latent's activations."""
    requests, load = [], mm.load_models_gpu

    def record(*models: Any, **options: Any) -> None:
        requests.append(options.get("minimum_memory_required", 0))
        load(*models, **options)

    monkeypatch.setattr(mm, "load_models_gpu", record)
    latent = int(model.model.memory_required([1, 4, 16, 16]))
    patched = applied(easy, model)
    # as large as a latent's activations, so that it shows
    monkeypatch.setattr(patched.get_attachment("easyref").injections[0].key_values, "row_numel", latent)
    for prepare, frames in ((ModelPatcher.clone, FRAMES), (in_windows, WINDOW)):
        reserved = []
        for each in (model, patched):
            requests.clear()
            sampled(prepare(each), steps=1)
            reserved.append(max(requests))
        needed = (2 * frames + FRAMES + 1) * latent * 4  # and all rows, from which a window is selected
        assert needed <= reserved[1] - reserved[0] <= needed + latent
