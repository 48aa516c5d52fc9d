"""The caches of the group encoder in the host: their device, their use, and when they are cleared."""

from __future__ import annotations

import functools
import gc
import weakref

import comfy.model_management as mm
import pytest
import torch
from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import CurrentNodeContext

from devkit.host import golden
from devkit.host.sampling import golden_easy

IMAGES = [image[0] for image in golden.references()]


@pytest.fixture
def easyref(pack):
    return golden.load(pack)


@pytest.fixture
def encode(pack):
    return functools.partial(golden.encode, pack)


@pytest.fixture
def vision_calls(easyref):
    """Numbers of images in each call of the vision tower."""
    counts = []
    visual = easyref.model.mllm.encoder.visual
    visual.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[1])))
    return counts


@pytest.fixture
def requested(pack, monkeypatch):
    """Bytes requested from the host for each encoding, without the constant part."""
    slack = golden.part(pack, "easyref_core.mllm.budget").ALLOCATOR_SLACK_BYTES
    requests, load = [], mm.load_models_gpu

    def recording(models, memory_required=0, **options):
        requests.append(memory_required - slack)
        load(models, memory_required, **options)

    monkeypatch.setattr(mm, "load_models_gpu", recording)
    return requests


def test_another_prompt_runs_no_vision(easyref, encode, vision_calls):
    first, second = encode(easyref), encode(easyref, "a dog in the snow")
    assert vision_calls == [3]
    easyref.model.clear_cache()
    assert golden.error(second.states, encode(easyref, "a dog in the snow").states) <= 1e-5
    assert golden.error(first.states, encode(easyref).states) <= 1e-5


def test_memory_is_requested_for_uncached_work_only(easyref, encode, requested):
    encode(easyref)
    encode(easyref, "a dog")
    assert requested[1] < requested[0] / 2
    requested.clear()
    easyref.model.clear_cache()
    for _ in range(2):
        easyref.vision_features(IMAGES, golden.SIZE, lambda done: None)
    assert requested[1] < requested[0] / 2


def test_states_are_on_the_hosts_intermediate_device(pack, encode, monkeypatch):
    monkeypatch.setattr(mm, "intermediate_device", lambda: torch.device("meta"))
    assert encode(golden.load(pack)).states.device.type == "meta"


def test_unload_models_clears_the_cache_unless_a_prompt_runs(easyref, encode):
    encode(easyref)
    nbytes = easyref.model.group_encoder.caches.nbytes
    with CurrentNodeContext("prompt", "node"):
        mm.unload_all_models()
    assert easyref.model.group_encoder.caches.nbytes == nbytes > 0
    encode(easyref, "a dog")
    mm.unload_all_models()
    assert easyref.model.group_encoder.caches.nbytes == 0


def test_unload_models_clears_the_cache_after_the_mllm_was_unloaded(pack, encode, model):
    easy = golden_easy(pack)
    easyref = easy.easyref
    encode(easyref)
    patched = easy.apply(model, lora=0.0)
    with CurrentNodeContext("prompt", "node"):
        mm.unload_all_models()
        mm.load_models_gpu([patched])
    assert easyref.model.group_encoder.caches.nbytes > 0
    mm.unload_all_models()
    assert easyref.model.group_encoder.caches.nbytes == 0


def test_callback_is_attached_once_and_only_to_patched_models(easy, model):
    for neutral in ({"weight": 0.0}, {"start": 0.5, "end": 0.5}):
        assert easy.apply(model, lora=0.0, **neutral).callbacks == model.callbacks
    twice = easy.apply(easy.apply(model, lora=0.0), lora=0.0)
    assert len(twice.get_all_callbacks(CallbacksMP.ON_DETACH)) == 1


def test_cache_is_freed_with_the_model(pack, encode):
    easyref = golden.load(pack)
    encode(easyref)
    assert easyref.model.group_encoder.caches.nbytes > 0
    references = [weakref.ref(easyref.model), weakref.ref(easyref.model.group_encoder)]
    del easyref
    mm.unload_all_models()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("out of memory")


def test_host_frees_memory_before_a_retry_in_smaller_chunks(easyref, encode, monkeypatch):
    expected = encode(easyref).states
    easyref.model.clear_cache()
    freed = []
    monkeypatch.setattr(mm, "soft_empty_cache", lambda: freed.append(1))

    def fail_once(*_: object) -> None:
        hook.remove()
        freed.clear()  # loading may free memory too
        out_of_memory()

    hook = easyref.model.mllm.encoder.layers[0].register_forward_pre_hook(fail_once)
    assert golden.error(encode(easyref).states, expected) <= 1e-5
    assert freed == [1]


def test_nothing_is_cached_if_memory_never_suffices(easyref, encode, vision_calls):
    expected = encode(easyref).states
    easyref.model.clear_cache()
    hook = easyref.model.mllm.encoder.visual.blocks[0].register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="Encode at a smaller size"):
        encode(easyref)
    hook.remove()
    vision_calls.clear()
    assert torch.equal(encode(easyref).states, expected)
    assert vision_calls == [3]
