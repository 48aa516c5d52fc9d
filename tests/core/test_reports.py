"""Reports from PIL images and tensors, without a host."""

from __future__ import annotations

import pytest
import torch

import easyref_core as er
from devkit import golden
from easyref_core.inspect import reports
from easyref_core.inspect.attention_maps import attention_shares, require_same_group
from easyref_core.inspect.influence import MIN_REFERENCES, Influence
from easyref_core.inspect.reference_share import Share, ShareKey
from easyref_core.unet.layout import Site

IMAGES = [torch.rand(48, 64, 3) for _ in range(2)]


def test_attention_report_names_every_share(model: er.EasyRef, context: er.ContextStates) -> None:
    shares = attention_shares(model, context)
    report = reports.attention_report(golden.references(), shares)
    for i, share in enumerate(shares.references):
        assert f"reference {i + 1}: {100 * share:.1f} %" in report.text
    assert "all references" in report.text
    assert max(float(heat.max()) for heat in reports.heat_maps(shares)) == 1
    from_tensors = [golden.as_tensor(image.convert("RGB")) for image in golden.references()]
    assert reports.attention_report(from_tensors, shares).image.tobytes() == report.image.tobytes()

    require_same_group(golden.references(), context, model.config)
    wider = [torch.rand(64, 200, 3), *golden.references()[1:]]
    for group in (golden.references()[:2], wider):
        with pytest.raises(ValueError, match="The group is not the one that was encoded"):
            require_same_group(group, context, model.config)


@pytest.mark.parametrize(
    ("outlier", "count", "verdict"),
    [
        (1, 2, "Reference 2 does not belong: its mean similarity is 7.00 robust"),
        (-1, MIN_REFERENCES - 1, "this needs at least 4 references"),
        (-1, MIN_REFERENCES, "No outlier found. Of the least similar reference"),
    ],
)
def test_influence_report_ends_with_a_verdict(outlier: int, count: int, verdict: str) -> None:
    influence = Influence([0.25] * count, torch.rand(count, count), outlier, 7.0)
    report = reports.influence_report([IMAGES[0]] * count, influence)
    assert "reference 1: the tokens change by 0.2500" in report.text
    assert verdict in report.text.splitlines()[-1]


def test_where_it_acts_report_is_taller_with_images() -> None:
    shares = {ShareKey(1.0, Site("middle", 0, 0), False): Share(0.5, torch.rand(2, 2))}
    alone = reports.where_it_acts_report(shares, name=" of Apply EasyRef 2")
    assert "term of Apply EasyRef 2 beside the text's attention, 1 steps\nmid: 0.500" in alone.text
    assert reports.where_it_acts_report(shares, IMAGES).image.width > alone.image.width


@pytest.mark.parametrize(("crop", "loss"), [(True, "50 % of it"), (False, "it is squeezed")])
def test_consistency_report_names_the_best_and_the_loss(crop: bool, loss: str) -> None:
    cosines = torch.tensor([[0.1, 0.2], [0.4, 0.6]])
    text = reports.consistency_report(IMAGES, cosines, [(64, 128), (64, 64)], crop).text
    assert "picture 2: 0.500" in text
    assert "Picture 2 is closest. Mean of all: 0.325." in text
    assert f"Reference 1 is 128x64: {loss}" in text
    assert "Reference 2" not in text


def test_weight_sheet_puts_each_image_into_its_cell() -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    batches = [[colour.expand(64, 64, 3)] for colour in colours]
    sheet = reports.weight_sheet(batches, [0, 1, 0, 1], [0.5, 0.5, 1, 1], 128)
    found = [(golden.as_tensor(sheet) == colour).all(dim=-1) for colour in colours]
    assert [int(cell.sum()) for cell in found] == [128 * 128] * 4
    places = [tuple(cell.nonzero().min(dim=0).values.tolist()) for cell in found]
    (top, left), (bottom, right) = places[0], places[3]
    assert places == [(top, left), (top, right), (bottom, left), (bottom, right)]
    assert top < bottom
    assert left < right
    with pytest.raises(ValueError, match="1 pictures, 2 weights and 2 ends"):
        reports.weight_sheet(batches[:1], [0, 1], [1, 1])


def test_weight_sheet_tiles_a_batch_into_one_cell() -> None:
    values = 0.2, 0.4, 0.6
    batch = [torch.full((64, 64, 3), value) for value in values]
    sheet = golden.as_tensor(reports.weight_sheet([batch], [1.0], [1.0], 128))
    assert all(((sheet * 255).round() == round(255 * value)).any() for value in values)
