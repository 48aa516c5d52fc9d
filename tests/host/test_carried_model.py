"""Contexts and reference tokens carry their EasyRef model; the host still manages its weights."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch
from torch import Tensor

from devkit.host import golden, graphs
from devkit.host.sampling import predict


@pytest.fixture(scope="module")
def context(easy) -> Any:
    return golden.encode(easy.pack, easy.easyref)


@pytest.fixture(scope="module")
def another(pack) -> Any:
    """The same checkpoint in another precision."""
    return golden.load(pack, "bf16")


def from_file(easy) -> Any:
    """The golden tokens as Load Reference Tokens returns them."""
    return easy.pair(easy.tokens.conditional, easy.tokens.unconditional)


def equal(first: Any, second: Any) -> bool:
    sides = ("conditional", "unconditional")
    return all(torch.equal(Tensor(getattr(first, side)), Tensor(getattr(second, side))) for side in sides)


# Wiring


def test_image_is_the_same_without_the_wires(server) -> None:
    wired = graphs.image(server, graphs.easyref())
    graph = graphs.easyref()
    for name in ("aggregate", "apply"):
        del graph[name]["inputs"]["easyref"]
    assert graphs.image(server, graph) == wired
    assert graphs.run(server, graph)[0] == set()


def test_tokens_of_the_carried_model_are_those_of_the_connected_one(easy, context, execute) -> None:
    carried = execute("EasyRefAggregate", context).result[0]
    assert carried.easyref is easy.easyref
    assert equal(carried, execute("EasyRefAggregate", context, easyref=easy.easyref).result[0])


def test_connected_model_takes_precedence(easy, another, context, execute) -> None:
    tokens = execute("EasyRefAggregate", context, easyref=another).result[0]
    assert tokens.easyref is another
    assert equal(tokens, another.aggregate(context))
    assert not equal(tokens, easy.easyref.aggregate(context))


def test_apply_uses_the_connected_model_or_the_carried_one(easy, another, model) -> None:
    both = [predict(easy.apply(model, easyref=given)) for given in (None, easy.easyref)]
    assert torch.equal(*both)
    assert not torch.equal(both[0], predict(easy.apply(model, easyref=another)))


def test_connected_model_of_another_checkpoint_is_refused(pack, easy, context, model, tmp_path, execute):
    golden.write_other_tokens(tmp_path / "other.safetensors")
    other = golden.load(pack, checkpoint=tmp_path / "other.safetensors")
    for name, inputs in (
        ("EasyRefAggregate", (context,)),
        ("EasyRefApply", (model, easy.tokens, 1.0, 0.0, 1.0, 1.0)),
        ("EasyRefReferenceAttention", (context, golden.references())),
    ):
        with pytest.raises(ValueError, match=r"made by another EasyRef checkpoint .*other\.safetensors"):
            execute(name, *inputs, easyref=other)


def test_tokens_from_a_file_need_a_connected_model(easy, model) -> None:
    tokens = from_file(easy)
    with pytest.raises(ValueError, match=r"^easyref is not connected.* Connect Load EasyRef"):
        easy.apply(model, tokens=tokens, easyref=None)
    assert torch.equal(predict(easy.apply(model, tokens=tokens)), predict(easy.apply(model)))


def test_weighed_context_carries_its_model(easy, context, execute) -> None:
    weighed = execute("EasyRefWeighReferences", context, "1, 0.5, 1").result[0]
    assert weighed.easyref is easy.easyref
    assert not equal(execute("EasyRefAggregate", weighed).result[0], easy.tokens)


@pytest.mark.parametrize(
    ("node", "settings"),
    [
        ("EasyRefCombineTokens", {"method": "concat", "factor": 0.5, "weights": ""}),
        ("EasyRefBatchTokens", {}),
        ("EasyRefTokensOverFrames", {"frames": 3, "easing": "linear"}),
    ],
)
def test_combined_tokens_carry_the_model_of_the_first_that_has_one(easy, execute, node: str, settings: dict):
    tokens = {"tokens0": from_file(easy), "tokens1": easy.tokens}
    assert execute(node, tokens, **settings).result[0].easyref is easy.easyref
    tokens["tokens1"] = from_file(easy)
    assert execute(node, tokens, **settings).result[0].easyref is None


# Memory


def test_host_finds_the_patchers_of_the_model_itself(easy, context) -> None:
    for value in (context, easy.tokens):
        assert value.patcher is easy.easyref.patcher
        assert value.get_models() == easy.easyref.get_models()
    assert from_file(easy).patcher is None
    assert from_file(easy).get_models() == []


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "is_model_patcher_output"), reason="not in this ComfyUI")
def test_host_counts_a_context_and_tokens_as_models(easy, context) -> None:
    """So that under memory pressure it evicts those of earlier prompts, and protects the current ones."""
    found = [*map(comfy.model_patcher.is_model_patcher_output, (context, easy.tokens, from_file(easy)))]
    assert found == [True, True, False]


def test_a_held_context_does_not_keep_the_weights_on_the_device(pack) -> None:
    easyref = golden.load(pack)
    context = golden.encode(pack, easyref)
    tokens = easyref.aggregate(context)
    patchers = easyref.get_models()
    mm.load_models_gpu(patchers)
    del easyref
    mm.unload_all_models()
    assert not [loaded for loaded in mm.current_loaded_models if loaded.model in patchers]
    assert golden.error(context.easyref.aggregate(context).conditional, tokens.conditional) == 0


@pytest.mark.parametrize("held", ["context", "tokens"])
def test_model_is_freed_with_the_last_value_that_carries_it(pack, held: str) -> None:
    easyref = golden.load(pack)
    values = {"context": golden.encode(pack, easyref)}
    values["tokens"] = easyref.aggregate(values["context"])
    easyref.key_values(values["tokens"])  # cached by the tokens, which must not keep themselves alive
    model, value = weakref.ref(easyref.model), values.pop(held)
    del easyref
    values.clear()
    mm.unload_all_models()
    gc.collect()
    assert model() is not None
    del value
    gc.collect()
    assert model() is None


# Copies


def test_deep_copy_refers_to_the_same_model(easy, context) -> None:
    for value in (context, easy.tokens):
        assert copy.deepcopy(value).easyref is easy.easyref
    assert equal(copy.deepcopy(easy.tokens), easy.tokens)
