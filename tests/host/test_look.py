"""The inspection nodes in the host's process: outputs, reports, and that recording changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from devkit.host import golden
from devkit.host.sampling import cfg_guider, predict, sample, state
from devkit.host.tiny_nodes.tiny_clip import load_tiny_clip_vision
from devkit.host.tiny_nodes.tiny_images import noise
from devkit.host.tiny_nodes.tiny_sdxl import random_conditioning

pytestmark = pytest.mark.one_host

STEPS = 3
BLOCKS = 11


@pytest.fixture(scope="module")
def outputs(execute) -> Callable[..., tuple]:
    """Runs a node: outputs(name, *inputs)."""
    return lambda name, *inputs: execute(name, *inputs).result


@pytest.fixture
def recorded(outputs, easy, model) -> tuple[ModelPatcher, Any]:
    """The model with EasyRef applied and recorded, and its record."""
    return outputs("EasyRefRecord", easy.apply(model))


def run(model: ModelPatcher, cfg: float = 5.0, prompt: int = 0) -> torch.Tensor:
    guider = cfg_guider(model, random_conditioning(prompt, 77), random_conditioning(1, 77), cfg)
    return sample(guider, STEPS)


def test_attention_maps_have_the_size_of_each_reference(pack, easy, outputs) -> None:
    group = golden.references()
    context = golden.encode(pack, easy.easyref, "a cat")
    sheet, maps, report = outputs("EasyRefReferenceAttention", context, group, -1)
    assert sheet.shape[0] == 1
    assert 0 <= sheet.min() <= sheet.max() <= 1
    assert [mask.shape[1:] for mask in maps] == [image.shape[1:3] for image in group]
    assert max(float(mask.max()) for mask in maps) == pytest.approx(1, abs=0.05)
    for i, share in enumerate(easy.easyref.attention(context, -1).references):
        assert f"reference {i + 1}: {100 * share:.1f} %" in report
    with pytest.raises(ValueError, match="The group is not the one that was encoded"):
        outputs("EasyRefReferenceAttention", context, group[:2])


@pytest.fixture
def influence(pack, easy, outputs) -> Callable[[Any], tuple]:
    inputs = "a cat", golden.instruction(pack), golden.SIZE
    return lambda group: outputs("EasyRefReferenceInfluence", easy.easyref, group, *inputs)


def test_influence_is_the_change_without_each(pack, easy, influence) -> None:
    group = golden.references()
    _, report, outlier, others = influence(group)

    def tokens(of: tuple) -> torch.Tensor:
        context = golden.encode(pack, easy.easyref, "a cat", of)
        return easy.easyref.aggregate(context).conditional.as_subclass(torch.Tensor)

    for i in range(3):
        without = tokens(group[:i] + group[i + 1 :])
        cosine = torch.nn.functional.cosine_similarity(tokens(group), without, dim=-1).mean()
        assert f"reference {i + 1}: the tokens change by {1 - cosine:.4f}" in report
    assert "this needs at least 4 references" in report
    assert (outlier, len(others)) == (-1, 3)


def test_outlier_is_named_and_taken_out(influence) -> None:
    base = noise("1x64x64x3", 0)[0]
    group = [(base + 0.02 * noise("1x64x64x3", i + 1)[0]).clamp(0, 1) for i in range(5)]
    group[3] = torch.zeros(1, 64, 64, 3)
    _, report, outlier, others = influence(tuple(group))
    assert outlier == 3
    assert "Reference 4 does not belong" in report
    assert [id(image) for image in others] == [id(image) for i, image in enumerate(group) if i != 3]


def test_influence_takes_a_batch_and_needs_two(influence) -> None:
    assert len(influence(noise("2x64x64x3", 0)[0])[3]) == 2
    with pytest.raises(ValueError, match="Give it 2 or more"):
        influence(golden.references()[:1])


def test_influence_can_be_stopped(influence) -> None:
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            influence(golden.references())
    finally:
        mm.interrupt_current_processing(False)


def test_recording_changes_neither_image_nor_model(easy, model, outputs) -> None:
    applied = easy.apply(model)
    before, expected = state(applied), predict(applied)
    record_model, record = outputs("EasyRefRecord", applied)
    assert torch.equal(predict(record_model), expected)
    assert record.recorders[0].shares()
    assert state(applied) == before
    record.recorders[0].clear()
    predict(applied)
    assert not record.recorders[0].shares()


def test_record_is_of_the_last_sampling_alone(easy, model, outputs, recorded) -> None:
    record_model, record = recorded
    run(record_model)  # with another prompt, so that a sum of both samplings would have other shares
    run(record_model, prompt=2)
    fresh_model, fresh = outputs("EasyRefRecord", easy.apply(model))
    run(fresh_model, prompt=2)
    shares, expected = (r.recorders[0].shares() for r in (record, fresh))
    assert shares.keys() == expected.keys()
    for key, share in expected.items():
        assert torch.equal(shares[key].grid, share.grid)


def test_apply_after_the_record_is_not_in_it(easy, recorded) -> None:
    first, record = recorded
    run(first)
    alone = record.recorders[0].shares()
    run(easy.apply(first, tokens=easy.other_tokens()))
    assert len(record.recorders) == 1
    assert record.recorders[0].shares().keys() == alone.keys()


def test_chain_has_a_record_for_each_apply(easy, model, outputs) -> None:
    chain = easy.apply(easy.apply(model), weight=0.5, end=0.5, tokens=easy.other_tokens())
    record_model, record = outputs("EasyRefRecord", chain)
    run(record_model)
    full, half = ({key.sigma for key in recorder.shares()} for recorder in record.recorders)
    assert len(half) < len(full) == STEPS
    _, masks, _, report = outputs("EasyRefWhereItActs", record, {})
    assert len(masks) == 2
    assert "term of Apply EasyRef 2 beside" in report


def test_model_without_apply_is_refused(easy, model, outputs) -> None:
    for plain in (model, easy.apply(model, weight=0.0)):
        with pytest.raises(ValueError, match="no reference term to record"):
            outputs("EasyRefRecord", plain)


@pytest.mark.parametrize("side", ["prompt", "negative"])
def test_charts_are_of_all_blocks_and_steps(outputs, recorded, side: str) -> None:
    latent = {"samples": run(recorded[0])}
    chart, masks, mean, report = outputs("EasyRefWhereItActs", recorded[1], latent, side)
    assert f"{STEPS} steps" in report
    assert sum(line.startswith(("in ", "mid", "out ")) for line in report.splitlines()) == BLOCKS
    assert masks.shape[0] == 1
    assert float(masks.max()) == pytest.approx(1)
    assert mean > 0
    with_images = outputs("EasyRefWhereItActs", recorded[1], torch.rand(2, 96, 128, 3), side)[0]
    assert with_images.shape != chart.shape


def test_empty_record_and_missing_side_say_why(outputs, recorded) -> None:
    with pytest.raises(ValueError, match="Nothing was recorded on the side of the prompt"):
        outputs("EasyRefWhereItActs", recorded[1], {})
    run(recorded[0], cfg=1.0)
    with pytest.raises(ValueError, match=r"without guidance \(cfg 1\) the negative side does not exist"):
        outputs("EasyRefWhereItActs", recorded[1], {}, "negative")


def test_consistency_is_the_cosine_of_clip_vision(outputs) -> None:
    clip, group = load_tiny_clip_vision(), golden.references()
    images = torch.cat(noise("1x64x64x3 1x64x64x3", 5))
    with torch.inference_mode():
        embeddings, references = (
            torch.cat([clip.encode_image(image)["image_embeds"] for image in of]).float()
            for of in (images.split(1), group)
        )
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], references[None], dim=-1)
    _, best, mean, index, report = outputs("EasyRefConsistency", clip, images, group)
    assert mean == pytest.approx(float(cosines.mean()), abs=1e-4)
    assert index == int(cosines.mean(dim=1).argmax())
    assert torch.equal(best, images[index : index + 1])
    assert f"picture 1: {cosines[0].mean():.3f}" in report


@pytest.mark.parametrize(("crop", "loss"), [("center", "50 % of it"), ("none", "it is squeezed")])
def test_consistency_finds_the_reference_itself(outputs, crop: str, loss: str) -> None:
    wide = noise("2x64x128x3", 0)[0]
    inputs = load_tiny_clip_vision(), wide, wide[1:], crop
    *_, index, report = outputs("EasyRefConsistency", *inputs)
    assert index == 1
    assert "picture 2: 1.000" in report
    assert f"Reference 1 is 128x64: {loss}" in report
    with pytest.raises(ValueError, match="0 pictures and 1 references"):
        outputs("EasyRefConsistency", inputs[0], wide[:0], wide[1:])


def test_pairs_are_rows_of_columns(outputs) -> None:
    weights, ends = outputs("EasyRefWeightSheet", "0, 1 1", "0.5,1")
    assert (weights, ends) == ([0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1, x", "'x'"),
        ("0.5; 4", "weights has '4' where a number is wanted, from -1 to 3"),
        ("nan", "'nan'"),
        (" ", "empty"),
    ],
)
def test_invalid_list_of_weights_is_refused(outputs, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        outputs("EasyRefWeightSheet", text, "1")
