"""Reference attention on a diffusers UNet: the authors' predictions, and a UNet restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, error, predict
from easyref_core.unet import diffusers_unet

Apply = Callable[..., diffusers_unet.Attachment]


@pytest.fixture
def apply(unet, model, tokens, uncond) -> Apply:
    """Conditions the UNet, on the golden group where nothing else is given."""

    def apply(cond=tokens, uncond=uncond, **settings: float) -> diffusers_unet.Attachment:
        return diffusers_unet.apply(unet, model, cond, uncond, **settings)

    return apply


def test_the_bare_unet_is_the_authors(unet, expected) -> None:
    assert error(predict(unet, expected), expected["unet.noise_pred.base"]) <= EXACT


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_noise_prediction(unet, expected, apply, weight: float) -> None:
    apply(weight=weight)
    assert error(predict(unet, expected), expected[f"unet.noise_pred.scale_{weight}"]) <= EXACT


def test_without_unconditional_tokens_all_rows_are_conditional(unet, expected, apply) -> None:
    apply(uncond=None)
    assert error(predict(unet, expected)[1:], expected["unet.noise_pred.scale_1.0"][1:]) <= EXACT


def test_a_batch_of_several_images_has_its_unconditional_rows_first(unet, expected, apply) -> None:
    apply()
    twice = golden.twice(expected)
    assert error(predict(unet, twice), twice["unet.noise_pred.scale_1.0"]) <= EXACT


def test_a_batch_of_different_groups_is_each_group_alone(unet, model, tokens, expected, apply) -> None:
    groups = tokens, model.aggregate(model.encode(golden.references()[:1], "a cat", size=golden.SIZE))
    alone = []
    for group in groups:
        attachment = apply(group)
        alone.append(predict(unet, expected))
        attachment.remove()
    apply(torch.cat([torch.Tensor(group) for group in groups]))
    assert error(alone[0], alone[1]) > 100 * EXACT
    twice = golden.twice(expected)
    assert error(predict(unet, twice), torch.stack(alone, dim=1).flatten(0, 1)) <= EXACT


def test_unconditional_rows_that_match_no_group_are_refused(tokens, apply) -> None:
    two, three = (torch.Tensor(tokens).repeat(n, 1, 1) for n in (2, 3))
    message = r"2 rows of unconditional tokens for 3 groups; wanted 1, or one per group"
    with pytest.raises(ValueError, match=message):
        apply(three, two)


def test_at_weight_0_and_lora_strength_0_the_unet_predicts_bit_for_bit_as_bare(unet, expected, apply) -> None:
    bare = predict(unet, expected)
    apply(weight=0.0, lora_strength=0.0)
    assert torch.equal(predict(unet, expected), bare)


def test_lora_is_proportional_to_its_strength(unet, apply) -> None:
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q

    def output(strength: float) -> torch.Tensor:
        attachment = apply(uncond=None, lora_strength=strength)
        output = layer(x)
        attachment.remove()
        return output

    assert error(output(1.0), layer(x)) > 100 * EXACT
    assert error(output(-0.5), layer(x) - 0.5 * (output(1.0) - layer(x))) <= EXACT


def test_remove_restores_the_unet(unet, expected, apply) -> None:
    bare, processors = predict(unet, expected), unet.attn_processors
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    attachment = apply()
    assert not torch.equal(predict(unet, expected), bare)
    attachment.remove()
    assert torch.equal(predict(unet, expected), bare)
    assert all(processor is processors[name] for name, processor in unet.attn_processors.items())
    restored = unet.state_dict()
    assert weights.keys() == restored.keys()
    assert all(torch.equal(weights[name], restored[name]) for name in weights)


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the identity of the keys of each computed reference term."""
    terms: list[int] = []
    plain = diffusers_unet.reference_attention

    def counted(q: torch.Tensor, key_value: tuple, *settings: object) -> torch.Tensor:
        terms.append(id(key_value[0]))
        return plain(q, key_value, *settings)

    monkeypatch.setattr(diffusers_unet, "reference_attention", counted)
    return terms


@pytest.mark.parametrize(("weight", "count"), [(1.0, 17), (0.0, 0)])
def test_each_cross_attention_computes_one_term_a_pass(
    unet, expected, apply, terms: list[int], weight: float, count: int
) -> None:
    apply(weight=weight)
    predict(unet, expected)
    assert len(terms) == len(set(terms)) == count
    assert len([name for name in unet.attn_processors if ".attn2." in name]) == 17


def test_gradients_reach_the_tokens(unet, expected, tokens, apply) -> None:
    rows = tokens.clone().requires_grad_()
    apply(rows, None)
    golden.forward(unet, expected).square().mean().backward()
    assert rows.grad.abs().min() > 0


@pytest.mark.parametrize("step", [(er.EasyRef, "key_values"), (diffusers_unet.Attachment, "condition")])
def test_the_unet_is_bare_after_a_failure(unet, expected, apply, step: tuple, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    bare = predict(unet, expected)
    monkeypatch.setattr(*step, full)
    with pytest.raises(torch.OutOfMemoryError):
        apply()
    monkeypatch.undo()
    assert torch.equal(predict(unet, expected), bare)
    apply().remove()


def test_a_unet_that_is_conditioned_already_is_refused(apply) -> None:
    attachment = apply()
    with pytest.raises(ValueError, match=r"conditioned on references already.*remove\(\)"):
        apply()
    attachment.remove()
    apply().remove()
