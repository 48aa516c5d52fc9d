"""The diffusers host: the authors' noise predictions, and a UNet given back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, Tensors, error, predict
from easyref_core.unet import diffusers_unet
from easyref_core.unet.reference_attention import KeyValue

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def hooks(unet: UNet2DConditionModel) -> int:
    """How many hooks the UNet's modules carry."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_the_bare_unet_is_the_authors(unet: UNet2DConditionModel, expected: Tensors) -> None:
    assert error(predict(unet, expected), expected["unet.noise_pred.base"]) <= EXACT


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_noise_prediction(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    expected: Tensors,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
    weight: float,
) -> None:
    diffusers_unet.apply(unet, model, tokens, uncond, weight=weight)
    assert error(predict(unet, expected), expected[f"unet.noise_pred.scale_{weight}"]) <= EXACT


def test_without_unconditional_tokens_all_rows_are_conditional(
    unet: UNet2DConditionModel, model: er.EasyRef, expected: Tensors, tokens: er.ReferenceTokens
) -> None:
    diffusers_unet.apply(unet, model, tokens, None)
    assert error(predict(unet, expected)[1:], expected["unet.noise_pred.scale_1.0"][1:]) <= EXACT


def test_a_batch_of_several_images_has_its_unconditional_rows_first(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    expected: Tensors,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
) -> None:
    twice = {name: t.repeat_interleave(2, dim=0) for name, t in expected.items() if name.startswith("unet.")}
    diffusers_unet.apply(unet, model, tokens, uncond)
    assert error(predict(unet, twice), twice["unet.noise_pred.scale_1.0"]) <= EXACT


def test_a_batch_of_different_groups_is_each_group_alone(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    expected: Tensors,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
) -> None:
    others = model.aggregate(model.encode(golden.references()[:1], "a cat", size=golden.SIZE))
    alone = []
    for group in (tokens, others):
        attached = diffusers_unet.apply(unet, model, group, uncond)
        alone.append(predict(unet, expected))
        attached.remove()
    twice = {name: t.repeat_interleave(2, dim=0) for name, t in expected.items() if name.startswith("unet.")}
    diffusers_unet.apply(unet, model, torch.cat([torch.Tensor(t) for t in (tokens, others)]), uncond)
    together = predict(unet, twice)
    assert error(alone[0], alone[1]) > 100 * EXACT
    assert error(together, torch.stack(alone, dim=1).flatten(0, 1)) <= EXACT


def test_unconditional_rows_that_match_no_group_are_refused(
    unet: UNet2DConditionModel, model: er.EasyRef, tokens: er.ReferenceTokens
) -> None:
    two, three = (torch.Tensor(tokens).repeat(n, 1, 1) for n in (2, 3))
    with pytest.raises(
        ValueError, match=r"2 rows of unconditional tokens for 3 groups; wanted 1, or one a group"
    ):
        diffusers_unet.apply(unet, model, three, two)


def test_at_weight_0_and_lora_strength_0_the_unet_answers_bit_for_bit_as_bare(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    expected: Tensors,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
) -> None:
    bare = predict(unet, expected)
    diffusers_unet.apply(unet, model, tokens, uncond, weight=0.0, lora_strength=0.0)
    assert torch.equal(predict(unet, expected), bare)


def test_lora_counts_by_its_strength(
    unet: UNet2DConditionModel, model: er.EasyRef, tokens: er.ReferenceTokens
) -> None:
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q

    def output(strength: float) -> torch.Tensor:
        attached = diffusers_unet.apply(unet, model, tokens, None, lora_strength=strength)
        answer = layer(x)
        attached.remove()
        return answer

    assert error(output(-0.5), layer(x) - 0.5 * (output(1.0) - layer(x))) <= EXACT


class TestRemoved:
    """What is left after attaching, running and removing: nothing."""

    def test_the_answer_is_the_same_bit_for_bit(self, unet, model, expected, tokens, uncond) -> None:
        bare = predict(unet, expected)
        attached = diffusers_unet.apply(unet, model, tokens, uncond)
        attached.remove()
        assert torch.equal(predict(unet, expected), bare)

    def test_the_weights_are_the_same_bit_for_bit(self, unet, model, expected, tokens, uncond) -> None:
        before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        attached = diffusers_unet.apply(unet, model, tokens, uncond)
        predict(unet, expected)
        attached.remove()
        after = unet.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_processors_are_the_same_objects(self, unet, model, expected, tokens, uncond) -> None:
        before = unet.attn_processors
        diffusers_unet.apply(unet, model, tokens, uncond).remove()
        assert all(after is before[name] for name, after in unet.attn_processors.items())

    def test_no_hook_is_left(self, unet, model, expected, tokens, uncond) -> None:
        attached = diffusers_unet.apply(unet, model, tokens, uncond)
        assert hooks(unet) == 4 * len(unet.attn_processors)  # the LoRA of q, k, v and out
        attached.remove()
        assert hooks(unet) == 0


@pytest.fixture
def fired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the identity of the keys that each computed reference term attended to."""
    fired: list[int] = []
    plain = diffusers_unet.reference_attention

    def counted(q: torch.Tensor, key_value: KeyValue, *settings: object) -> torch.Tensor:
        fired.append(id(key_value[0]))
        return plain(q, key_value, *settings)

    monkeypatch.setattr(diffusers_unet, "reference_attention", counted)
    return fired


def test_every_cross_attention_fires_once_per_pass(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    expected: Tensors,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
    fired: list[int],
) -> None:
    diffusers_unet.apply(unet, model, tokens, uncond)
    predict(unet, expected)
    sites = [name for name in unet.attn_processors if ".attn2." in name]
    assert len(fired) == len(set(fired)) == len(sites) == 17


def test_at_weight_0_no_reference_term_is_computed(
    unet: UNet2DConditionModel,
    model: er.EasyRef,
    expected: Tensors,
    tokens: er.ReferenceTokens,
    uncond: er.ReferenceTokens,
    fired: list[int],
) -> None:
    diffusers_unet.apply(unet, model, tokens, uncond, weight=0.0)
    predict(unet, expected)
    assert not fired


def test_gradients_reach_the_tokens(
    unet: UNet2DConditionModel, model: er.EasyRef, expected: Tensors, tokens: er.ReferenceTokens
) -> None:
    rows = tokens.clone().requires_grad_()
    diffusers_unet.apply(unet, model, rows, None)
    golden.forward(unet, expected).square().mean().backward()
    assert rows.grad.abs().min() > 0


@pytest.mark.parametrize("where", ["key_values", "condition"])
def test_unet_is_left_bare_where_conditioning_fails(
    model, unet, tokens, uncond, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    before = hooks(unet)
    monkeypatch.setattr(er.EasyRef if where == "key_values" else diffusers_unet.Attachment, where, full)
    with pytest.raises(torch.OutOfMemoryError):
        diffusers_unet.apply(unet, model, tokens, uncond)
    monkeypatch.undo()
    assert hooks(unet) == before
    diffusers_unet.apply(unet, model, tokens, uncond).remove()


def test_unet_that_is_conditioned_already_is_refused(model, unet, tokens, uncond) -> None:
    attachment = er.diffusers_unet.apply(unet, model, tokens, uncond)
    with pytest.raises(ValueError, match=r"conditioned on references already.*remove\(\)"):
        er.diffusers_unet.apply(unet, model, tokens, uncond)
    attachment.remove()
    er.diffusers_unet.apply(unet, model, tokens, uncond).remove()
