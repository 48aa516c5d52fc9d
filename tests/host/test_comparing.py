"""Weight sheets and consistency in the host."""

from __future__ import annotations

import pytest
import torch

from . import graphs
from .graphs import node
from .server import pixels


@pytest.fixture(scope="module", autouse=True)
def files(server):
    graphs.install_golden(server)


def sheet_of(weights: str, ends: str) -> graphs.Graph:
    lists = {"weight": ["lists", 0], "end_percent": ["lists", 1]}
    return {
        **graphs.easyref(apply=lists),
        "lists": node("EasyRefWeightSheet", weights=weights, end_percents=ends),
        "sheet": node("EasyRefSheet", images=["decode", 0], columns=["lists", 2], rows=["lists", 3]),
    }


def test_a_sheet_has_the_picture_of_each_weight_and_end(server):
    history = server.run(sheet_of("0, 1", "0.5, 1"))
    singles = [pixels(png) for png in server.images({"outputs": {"": history["outputs"]["save"]}})]
    assert len(singles) == 4
    alone = graphs.picture(server, graphs.easyref(apply={"weight": 1.0, "end_percent": 1.0}))
    assert singles[3].tobytes() == alone
    assert (singles[0] == singles[2]).all()  # weight 0 has no end
    assert (singles[1] != singles[3]).any()
    (png,) = server.images({"outputs": {"": history["outputs"]["sheet"]}})
    assert pixels(png).shape[1] > 2 * 128


def test_too_many_pictures_are_refused(server):
    weights = ", ".join(str(i / 100) for i in range(13))
    assert "65 pictures; at most 64" in graphs.failure(server, sheet_of(weights, "0.2, 0.4, 0.6, 0.8, 1"))


def test_a_sheet_of_the_wrong_number_is_refused(pack):
    sheet = pack.nodes.weight_sheet.EasyRefSheet
    with pytest.raises(ValueError, match="1 pictures for 1 rows and 2 columns"):
        sheet.execute([torch.rand(1, 8, 8, 3)], ["a, b"], ["c"])


class MeanColour:
    """In the place of a CLIP vision model: its features are a picture's mean colour."""

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> dict[str, torch.Tensor]:
        assert not crop
        return {"image_embeds": image.mean(dim=(1, 2))}


def test_the_nearest_picture_is_named(pack):
    node_class = pack.nodes.consistency.EasyRefConsistency
    red, blue = torch.tensor([1.0, 0.1, 0.1]), torch.tensor([0.1, 0.1, 1.0])
    images = torch.stack([blue.expand(8, 8, 3), red.expand(8, 8, 3)])
    group = (red.expand(1, 6, 9, 3), (red * 0.5).expand(1, 4, 4, 3))
    mean, best, plot, report = node_class.execute(MeanColour(), images, group).args
    assert best == 1
    assert 0 < mean < 1
    assert plot.shape[-1] == 3
    assert report.splitlines()[1].startswith("picture 2: 1.000 (1.000, 1.000)")
    with pytest.raises(ValueError, match="0 pictures"):
        node_class.execute(MeanColour(), images[:0], group)
