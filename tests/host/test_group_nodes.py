"""Groups from folders, crops, instructions and the budget, through a running host."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

from . import golden, graphs
from .graphs import node


@pytest.fixture(scope="module", autouse=True)
def files(server):
    graphs.install_golden(server)
    folder = server.base / "input" / "people" / "anna"
    folder.mkdir(parents=True)
    for i in range(golden.SETTINGS["images"]):
        (folder / f"{i + 8}.png").write_bytes((server.base / "input" / f"{i}.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    outside = server.base / "models" / "outside"
    outside.mkdir()
    Image.new("RGB", (64, 64)).save(outside / "secret.png")
    os.symlink(outside, server.base / "input" / "people" / "elsewhere")


def from_folder(**inputs):
    return node("EasyRefGroupFromFolder", **{"folder": "people/anna", "skip": 0, "limit": 8, **inputs})


def test_a_folder_is_the_group_of_its_images_in_natural_order(server):
    # 8.png, 9.png, 10.png: in alphabetical order 10 would come first
    expected = graphs.picture(server, graphs.easyref())
    graph = graphs.of_images(["folder", 0], {"folder": from_folder()})
    assert graphs.picture(server, graph) == expected


def test_only_folders_inside_the_input_folder_are_listed(server):
    options = server.object_info()["EasyRefGroupFromFolder"]["input"]["required"]["folder"][1]["options"]
    assert {"people", "people/anna"} <= set(options)
    assert "people/elsewhere" not in options
    for folder in ("people/elsewhere", "../models/outside", "/etc"):
        graph = graphs.of_images(["folder", 0], {"folder": from_folder(folder=folder)})
        assert "folder" in graphs.failure(server, graph)


def test_a_broken_image_is_named(server):
    folder = server.base / "input" / "broken"
    folder.mkdir()
    whole = (server.base / "input" / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    graph = graphs.of_images(["folder", 0], {"folder": from_folder(folder="broken")})
    assert "half.png cannot be read" in graphs.failure(server, graph)


def test_nothing_left_is_said(server):
    graph = graphs.of_images(["folder", 0], {"folder": from_folder(skip=3)})
    assert "holds no image after the first 3" in graphs.failure(server, graph)


def test_no_crop_changes_nothing(server):
    images = {f"image{i}": node("LoadImage", image=f"{i}.png") for i in range(golden.SETTINGS["images"])}
    crops = {
        f"crop{i}": node("EasyRefCropReference", images=[f"image{i}", 0], crop="none", padding=0.25)
        for i in range(len(images))
    }
    group = {"group": graphs.group(*([name, 0] for name in crops))}
    graph = graphs.of_images(["group", 0], {**images, **crops, **group})
    assert graphs.picture(server, graph) == graphs.picture(server, graphs.easyref())


def test_crops_are_squares_of_each_reference(pack):
    crop = pack.nodes.crop.EasyRefCropReference
    images = [torch.rand(2, 40, 60, 3), torch.rand(1, 50, 30, 3)]
    made = crop.execute(images, ["square around the middle"], [0.0]).args[0]
    assert [tuple(image.shape) for image in made] == [(1, 40, 40, 3), (1, 40, 40, 3), (1, 30, 30, 3)]
    mask = torch.zeros(1, 40, 60)
    mask[:, 10:20, 30:40] = 1
    (made,) = crop.execute(images[:1], ["square around the mask"], [0.0], [mask]).args[0][:1]
    assert torch.equal(made, images[0][:1, 10:20, 30:40])
    with pytest.raises(ValueError, match="0 masks for 3 references"):
        crop.execute(images, ["square around the mask"], [0.0])


def test_the_general_instruction_is_the_encoders_default(server):
    instruction = {"instruction": node("EasyRefInstruction", preset="general", language="en", text="")}
    default = server.object_info()["EasyRefEncodeGroup"]["input"]["required"]["instruction"][1]["default"]
    plain = graphs.picture(server, graphs.easyref(encode={"instruction": default}))
    graph = {**graphs.easyref(encode={"instruction": ["instruction", 0]}), **instruction}
    history = server.run(graph)
    assert graphs.pixels(server.images(history)[0]).tobytes() == plain
    assert history["outputs"]["instruction"]["text"] == [default]


def test_the_budget_lowers_the_size_until_the_group_fits(server):
    config_limit = 32768
    many = graphs.tiny_images("113x512x512x3")
    budget = node("EasyRefGroupBudget", easyref=["load", 0], group=["images", 0], size=1008)
    graph = {
        "load": graphs.easyref()["load"],
        "images": many,
        "budget": budget,
        "show": node("PreviewAny", source=["budget", 1]),
    }
    report = server.run(graph)["outputs"]["show"]["text"][0]
    assert report.startswith("113 references at size ")
    assert "lowered from 1008" in report or f"of {config_limit:,}" in report
