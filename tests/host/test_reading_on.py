"""The caches of the group encoder in the host: their device, their use, and when they are cleared."""

from __future__ import annotations

import gc

import comfy.model_management as mm
import pytest
import torch
from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import CurrentNodeContext

from devkit.host import golden


@pytest.fixture
def easyref(pack):
    return golden.load(pack)


def encode(pack, easyref, prompt: str = "a cat", images: slice = slice(None)):
    chosen = [image[0] for image in golden.references()[images]]
    return easyref.encode(chosen, prompt, golden.instruction(pack), golden.SIZE)


@pytest.fixture
def seen(easyref):
    """Numbers of images that the vision tower has encoded."""
    counts = []
    easyref.model.mllm.encoder.visual.register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[1]))
    )
    return counts


@pytest.fixture
def room(pack, monkeypatch):
    """Bytes requested from the host for each encoding, without the constant part."""
    held_back = golden.part(pack, "easyref_core.mllm.budget").ALLOCATOR_SLACK_BYTES
    asked, load = [], mm.load_models_gpu

    def recording(models, memory_required=0, **how):
        asked.append(memory_required - held_back)
        load(models, memory_required, **how)

    monkeypatch.setattr(mm, "load_models_gpu", recording)
    return asked


def test_a_change_of_prompt_runs_no_vision(pack, easyref, seen):
    first = encode(pack, easyref)
    again = encode(pack, easyref, "a dog in the snow")
    assert seen == [3]
    easyref.model.forget()
    assert golden.error(again.states, encode(pack, easyref, "a dog in the snow").states) <= 1e-5
    assert golden.error(first.states, encode(pack, easyref).states) <= 1e-5


def test_room_is_asked_for_what_is_left_to_do(pack, easyref, room):
    encode(pack, easyref)
    encode(pack, easyref, "a dog")
    assert room[1] < room[0] / 2


def test_it_is_kept_where_the_host_keeps_what_nodes_hand_on(pack, easyref, monkeypatch):
    assert easyref.model.reader.kept_on == mm.intermediate_device()
    monkeypatch.setattr(mm, "intermediate_device", lambda: torch.device("meta"))
    assert golden.load(pack).model.reader.kept_on.type == "meta"


def test_unload_models_gives_it_back(pack, easyref):
    encode(pack, easyref)
    assert easyref.model.reader.nbytes > 0
    mm.unload_all_models()
    assert easyref.model.reader.nbytes == 0


def test_making_room_while_a_prompt_runs_keeps_it(pack, easyref):
    encode(pack, easyref)
    kept = easyref.model.reader.nbytes
    with CurrentNodeContext("prompt", "node"):
        mm.unload_all_models()
    assert easyref.model.reader.nbytes == kept > 0


def applying(pack):
    """condition(model, easyref, tokens) with the weight, window and LoRA strength after these."""
    patch = golden.part(pack, "nodes.unet_patch.condition")
    return lambda model, easyref, tokens, *settings: patch.condition(
        model, easyref, tokens, patch.ApplySettings(*settings)
    )


def test_unload_models_gives_it_back_where_the_mllm_had_made_room_before(pack, easyref, model):
    apply = applying(pack)
    tokens = golden.tokens(pack, easyref)
    encode(pack, easyref)
    patched = apply(model, easyref, tokens, 1.0, 0.0, 1.0, 0.0)
    with CurrentNodeContext("prompt", "node"):
        mm.unload_all_models()
        mm.load_models_gpu([patched])
    assert easyref.model.reader.nbytes > 0
    mm.unload_all_models()
    assert easyref.model.reader.nbytes == 0


@pytest.mark.parametrize("settings", [(0.0, 0.0, 1.0, 0.0), (1.0, 0.5, 0.5, 0.0)])
def test_a_model_that_is_left_as_it_is_has_no_callback_either(pack, easyref, model, settings):
    apply = applying(pack)
    patched = apply(model, easyref, golden.tokens(pack, easyref), *settings)
    assert patched.callbacks == model.callbacks


def test_a_chain_of_apply_nodes_is_told_once(pack, easyref, model):
    apply = applying(pack)
    tokens = golden.tokens(pack, easyref)
    once = apply(model, easyref, tokens, 1.0, 0.0, 1.0, 0.0)
    twice = apply(once, easyref, tokens, 1.0, 0.0, 1.0, 0.0)
    assert len(twice.get_all_callbacks(CallbacksMP.ON_DETACH)) == 1


def test_room_for_looking_is_asked_for_what_was_not_seen(easyref, room):
    images = [image[0] for image in golden.references()]
    for _ in range(2):
        easyref.vision_features(images, golden.SIZE, lambda done: None)
    assert room[1] < room[0] / 2


def test_it_goes_with_the_loaded_model(pack):
    easyref = golden.load(pack)
    encode(pack, easyref)
    reader = easyref.model.reader
    kept = [prefix.states for prefix, _ in reader._prefixes._values.values()]
    assert kept
    alive = [t.untyped_storage() for t in kept]
    del easyref, reader, kept
    mm.unload_all_models()
    gc.collect()
    assert [s for s in alive if len(gc.get_referrers(s)) > 1] == []


def test_the_host_frees_before_encoding_goes_on_in_smaller_pieces(pack, easyref, monkeypatch):
    freed = []
    monkeypatch.setattr(easyref.model.reader, "free", lambda: freed.append(1))
    wanted = encode(pack, easyref).states
    easyref.model.forget()
    failed = []

    def once(*_: object) -> None:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("out of memory")

    hook = easyref.model.mllm.encoder.layers[0].register_forward_pre_hook(once)
    found = encode(pack, easyref).states
    hook.remove()
    assert freed == [1]
    assert golden.error(found, wanted) <= 1e-5


def test_nothing_left_where_memory_never_suffices(pack, easyref):
    wanted = encode(pack, easyref).states
    easyref.model.forget()

    def always(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    hook = easyref.model.mllm.encoder.visual.blocks[0].register_forward_pre_hook(always)
    with pytest.raises(torch.OutOfMemoryError, match="Encode at a smaller size"):
        encode(pack, easyref)
    hook.remove()
    reader = easyref.model.reader
    assert reader._features.nbytes + reader._prefixes.nbytes == 0
    assert torch.equal(encode(pack, easyref).states, wanted)
