"""The nodes that show what EasyRef does, in the host's process: what they say, and that looking changes nothing."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from devkit.host import golden
from devkit.host.sampling import Easy, cfg_guider, predict, sample
from devkit.host.tiny_nodes.tiny_clip import load_tiny_clip_vision
from devkit.host.tiny_nodes.tiny_images import noise
from devkit.host.tiny_nodes.tiny_sdxl import random_conditioning

from .test_unet_patch import state

pytestmark = pytest.mark.one_host

STEPS = 3
BLOCKS = 11


@pytest.fixture(scope="module")
def context(pack, easy) -> Any:
    images = [image[0] for image in golden.references()]
    return easy.easyref.encode(images, "a cat", golden.instruction(pack), golden.SIZE)


def execute(pack: ModuleType, node: str, *args: Any) -> tuple:
    """What a node gives, run as the host runs it."""
    with torch.inference_mode():
        return golden.node(pack, node).execute(*args).result


def recorded(pack: ModuleType, model: ModelPatcher) -> tuple[ModelPatcher, Any]:
    return execute(pack, "EasyRefRecord", model)


def run(model: ModelPatcher, cfg: float = 5.0) -> torch.Tensor:
    guider = cfg_guider(model, random_conditioning(0, 77), random_conditioning(1, 77), cfg)
    return sample(guider, STEPS)


# Reference attention


def test_attention_shows_every_reference(pack, easy, context) -> None:
    group = golden.references()
    sheet, maps, report = execute(pack, "EasyRefReferenceAttention", easy.easyref, context, group, -1)
    assert sheet.shape[0] == 1
    assert 0 <= sheet.min() <= sheet.max() <= 1
    assert [part.shape[1:] for part in maps] == [image.shape[1:3] for image in group]
    assert max(float(part.max()) for part in maps) == pytest.approx(1, abs=0.05)
    shares = easy.easyref.attention(context, -1)
    for i, share in enumerate(shares.references):
        assert f"reference {i + 1}: {100 * share:.1f} %" in report


def test_attention_refuses_another_group(pack, easy, context) -> None:
    wider = (torch.rand(1, 64, 200, 3), *golden.references()[1:])
    for group in (golden.references()[:2], wider):
        with pytest.raises(ValueError, match="The group is not the one that was encoded"):
            execute(pack, "EasyRefReferenceAttention", easy.easyref, context, group)


# Reference influence


def influence(pack: ModuleType, easy: Easy, group: Any) -> tuple:
    args = easy.easyref, group, "a cat", golden.instruction(pack), golden.SIZE
    return execute(pack, "EasyRefReferenceInfluence", *args)


def test_influence_is_the_change_without_each(pack, easy) -> None:
    group = golden.references()
    chart, report, odd, kept = influence(pack, easy, group)

    def tokens(of: tuple) -> torch.Tensor:
        images = [image[0] for image in of]
        made = easy.easyref.encode(images, "a cat", golden.instruction(pack), golden.SIZE)
        return easy.easyref.aggregate(made).conditional.as_subclass(torch.Tensor)

    whole = tokens(group)
    for i in range(3):
        without = tokens(group[:i] + group[i + 1 :])
        cosine = torch.nn.functional.cosine_similarity(whole, without, dim=-1).mean()
        assert f"reference {i + 1}: the tokens change by {1 - cosine:.4f}" in report
    assert "of fewer than 4" in report
    assert (odd, len(kept)) == (-1, 3)


def test_odd_one_is_named_and_taken_out(pack, easy) -> None:
    alike = noise("1x64x64x3", 0)[0]
    group = [(alike + 0.02 * noise("1x64x64x3", i + 1)[0]).clamp(0, 1) for i in range(5)]
    group[3] = torch.zeros(1, 64, 64, 3)
    _, report, odd, kept = influence(pack, easy, tuple(group))
    assert odd == 3
    assert "Reference 4 does not belong" in report
    assert [id(image) for image in kept] == [id(image) for i, image in enumerate(group) if i != 3]


def test_influence_takes_a_batch_and_needs_two(pack, easy) -> None:
    assert len(influence(pack, easy, noise("2x64x64x3", 0)[0])[3]) == 2
    with pytest.raises(ValueError, match="Give it 2 or more"):
        influence(pack, easy, golden.references()[:1])


def test_influence_can_be_stopped(pack, easy) -> None:
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            influence(pack, easy, golden.references())
    finally:
        mm.interrupt_current_processing(False)


# Where it acts


def test_recording_changes_neither_picture_nor_model(pack, easy, model) -> None:
    applied = easy.apply(model)
    before, expected = state(applied), predict(applied)
    record_model, record = recorded(pack, applied)
    assert torch.equal(predict(record_model), expected)
    assert record.recorders[0].shares()
    assert state(applied) == before
    record.recorders[0].clear()
    predict(applied)
    assert not record.recorders[0].shares()


def test_record_is_of_the_last_sampling_alone(pack, easy, model) -> None:
    record_model, record = recorded(pack, easy.apply(model))
    run(record_model)
    once = record.recorders[0].shares()
    run(record_model)
    twice = record.recorders[0].shares()
    assert once.keys() == twice.keys()
    # added up they would be the same shares: so what is summed is looked at
    total = record.recorders[0]._squares
    fresh_model, fresh = recorded(pack, easy.apply(model))
    run(fresh_model)
    for key, (term, attention) in fresh.recorders[0]._squares.items():
        assert torch.equal(total[key][0], term)
        assert torch.equal(total[key][1], attention)


def test_apply_after_the_record_is_not_in_it(pack, easy, model) -> None:
    first, record = recorded(pack, easy.apply(model))
    run(first)
    alone = record.recorders[0].shares()
    run(easy.apply(first, tokens=easy.other_tokens()))
    assert len(record.recorders) == 1
    assert record.recorders[0].shares().keys() == alone.keys()


def test_chain_has_a_record_for_each_apply(pack, easy, model) -> None:
    chain = easy.apply(easy.apply(model), weight=0.5, end=0.5, tokens=easy.other_tokens())
    patched, record = recorded(pack, chain)
    run(patched)
    whole, half = (recorder.shares() for recorder in record.recorders)
    assert len({moment.sigma for moment in half}) < len({moment.sigma for moment in whole}) == STEPS


def test_model_without_apply_is_refused(pack, easy, model) -> None:
    for plain in (model, easy.apply(model, weight=0.0)):
        with pytest.raises(ValueError, match="no reference term to record"):
            recorded(pack, plain)


@pytest.mark.parametrize("side", ["prompt", "negative"])
def test_charts_are_of_all_blocks_and_steps(pack, easy, model, side: str) -> None:
    patched, record = recorded(pack, easy.apply(model))
    latent = {"samples": run(patched)}
    chart, places, mean, report = execute(pack, "EasyRefWhereItActs", record, latent, side)
    assert f"{STEPS} steps" in report
    assert sum(line.startswith(("in ", "mid", "out ")) for line in report.splitlines()) == BLOCKS
    assert places.shape[0] == 1
    assert float(places.max()) == pytest.approx(1)
    assert mean > 0
    image = torch.rand(2, 96, 128, 3)
    with_pictures = execute(pack, "EasyRefWhereItActs", record, image, side)[0]
    assert with_pictures.shape != chart.shape


def test_empty_record_and_missing_side_say_why(pack, easy, model) -> None:
    patched, record = recorded(pack, easy.apply(model))
    with pytest.raises(ValueError, match="Nothing was recorded on the side of the prompt"):
        execute(pack, "EasyRefWhereItActs", record, {})
    run(patched, cfg=1.0)
    with pytest.raises(ValueError, match="at guidance 1 there is no negative side"):
        execute(pack, "EasyRefWhereItActs", record, {}, "negative")


# Consistency


def test_consistency_is_the_cosine_of_clip_vision(pack) -> None:
    clip, group = load_tiny_clip_vision(), golden.references()
    images = torch.cat([noise("1x64x64x3", 5)[0], noise("1x64x64x3", 6)[0]])
    with torch.inference_mode():
        pictures, references = (
            torch.cat([clip.encode_image(image)["image_embeds"] for image in of]).float()
            for of in (images.split(1), group)
        )
    wanted = torch.nn.functional.cosine_similarity(pictures[:, None], references[None], dim=-1)
    chart, best, mean, index, report = execute(pack, "EasyRefConsistency", clip, images, group)
    assert mean == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert index == int(wanted.mean(dim=1).argmax())
    assert torch.equal(best, images[index : index + 1])
    assert f"picture 1: {wanted[0].mean():.3f}" in report


def test_consistency_finds_the_reference_itself(pack) -> None:
    group = noise("3x64x64x3", 0)[0]
    images = torch.cat([noise("1x64x64x3", 9)[0], group[1:2]])
    _, _, _, index, report = execute(pack, "EasyRefConsistency", load_tiny_clip_vision(), images, group[1:2])
    assert index == 1
    assert "picture 2: 1.000" in report


@pytest.mark.parametrize(("crop", "said"), [("center", "50 % of it"), ("none", "it is squeezed")])
def test_consistency_says_what_clip_does_not_see(pack, crop: str, said: str) -> None:
    wide = torch.rand(1, 64, 128, 3)
    args = load_tiny_clip_vision(), torch.rand(1, 64, 64, 3), (wide, wide[:, :, :64]), crop
    report = execute(pack, "EasyRefConsistency", *args)[-1]
    assert f"Reference 1 is 128x64: {said}" in report
    assert "Reference 2" not in report


# Weight sheet


def test_pairs_are_rows_of_columns(pack) -> None:
    weights, ends = execute(pack, "EasyRefWeightSheet", "0, 1 1", "0.5,1")
    assert (weights, ends) == ([0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(("text", "named"), [("1, x", "'x'"), ("4", "'4'"), ("nan", "'nan'"), (" ", "empty")])
def test_what_is_no_list_of_weights(pack, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        execute(pack, "EasyRefWeightSheet", text, "1")


def test_sheet_puts_each_picture_in_its_cell(pack) -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    images = [colour.expand(1, 64, 64, 3) for colour in colours]
    weights, ends = execute(pack, "EasyRefWeightSheet", "0, 1", "0.5, 1")
    (sheet,) = execute(pack, "EasyRefSheet", images, weights, ends, [128])
    halves = [part for row in sheet[0].chunk(2) for part in row.chunk(2, dim=1)]
    for part, colour in zip(halves, colours, strict=True):
        assert (part == colour).all(dim=-1).sum() > 0.9 * 128 * 128


def test_sheet_shows_all_of_a_batch(pack) -> None:
    batch = torch.stack([torch.full((64, 64, 3), value) for value in (0.2, 0.4, 0.6)])
    (sheet,) = execute(pack, "EasyRefSheet", [batch], [1.0], [1.0], [128])
    assert all(((sheet * 255).round() == round(255 * value)).any() for value in (0.2, 0.4, 0.6))


def test_sheet_refuses_what_does_not_pair(pack) -> None:
    with pytest.raises(ValueError, match="1 pictures, 2 weights and 2 ends"):
        execute(pack, "EasyRefSheet", [torch.rand(1, 64, 64, 3)], [0.0, 1.0], [1.0, 1.0])
