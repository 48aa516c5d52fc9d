"""Masks of references: their way from Reference Group to the tokens, and the caches on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from devkit.host import golden, graphs

pytestmark = pytest.mark.one_host

REFERENCES = golden.references()
LEFT = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1)


@pytest.fixture
def group(execute) -> Any:
    """Reference Group: the golden references with masks, each in the list that the host passes."""

    def build(masks: list[Tensor] | None = None, **inputs: Any) -> Any:
        images = {f"image{i}": [image] for i, image in enumerate(REFERENCES)}
        return execute("EasyRefGroup", images, masks=masks, **inputs)

    return build


@pytest.fixture
def tokens(easy, execute) -> Any:
    def conditional(group: Any, prompt: str = "a cat") -> Tensor:
        settings = golden.instruction(easy.pack), golden.SIZE
        context = execute("EasyRefEncodeGroup", easy.easyref, group, prompt, *settings).result[0]
        return Tensor(execute("EasyRefAggregate", context).result[0].conditional)

    return conditional


def text_of(output: Any) -> str:
    return output.ui["text"][0]


@pytest.mark.parametrize(
    "masks",
    [
        [torch.ones(3, 64, 64)],
        [torch.ones(64, 64), torch.ones(1, 9, 30), torch.ones(1, 1)],
        [torch.ones(2, 8, 8), torch.ones(8, 8)],
    ],
    ids=["a batch", "a list of any sizes", "batches in a list"],
)
def test_ones_are_bit_identical(group, tokens, masks: list[Tensor]) -> None:
    assert torch.equal(tokens(group(masks).result[0]), tokens(group().result[0]))
    assert torch.equal(tokens(group().result[0]), tokens(REFERENCES))


def test_a_mask_of_zeros_is_weight_0(easy, execute, group, tokens) -> None:
    masked = tokens(group([torch.ones(1, 8, 8), torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]).result[0])
    settings = golden.instruction(easy.pack), golden.SIZE
    context = execute("EasyRefEncodeGroup", easy.easyref, REFERENCES, "a cat", *settings).result[0]
    weighed = execute("EasyRefWeighReferences", context, "1, 0, 1").result[0]
    assert torch.equal(masked, Tensor(execute("EasyRefAggregate", weighed).result[0].conditional))


def test_another_mask_gives_other_tokens_and_encodes_no_image_again(easy, group, tokens) -> None:
    easy.easyref.model.clear_cache()
    counts = []
    visual = easy.easyref.model.mllm.encoder.visual
    hook = visual.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[1])))
    masks = [None, [LEFT] * 3, [1 - LEFT] * 3, [LEFT] * 3, None]
    found = [tokens(group(each).result[0]) for each in masks]
    hook.remove()
    assert [golden.error(first, second) > 1e-3 for first, second in zip(found, found[1:], strict=False)] == [
        True
    ] * 4
    assert torch.equal(found[1], found[3])
    assert golden.error(found[0], found[4]) <= 1e-5
    assert counts == [3, 1]  # the references, and the black image of the unconditional side


@pytest.mark.parametrize("masks", [[torch.ones(2, 8, 8)], [torch.ones(8, 8)], [torch.ones(4, 8, 8)]])
def test_another_number_of_masks_is_refused(group, masks: list[Tensor]) -> None:
    count = sum(mask.reshape(-1, 8, 8).shape[0] for mask in masks)
    with pytest.raises(ValueError, match=f"^masks holds {count}, images 3 references. Connect one mask for"):
        group(masks)


def test_masks_stay_with_their_references(execute, group, folders, base) -> None:
    masks = [torch.full((4, 4), value) for value in (0.1, 0.2, 0.3)]
    first = group(masks).result[0]
    extended = group(group=[first]).result[0]
    assert [mask is not None for mask in extended.masks] == [True] * 3 + [False] * 3
    selected = execute("EasyRefSelectReferences", extended, "4, 2, 2").result[0]
    assert selected.masks[0] is None
    assert selected.masks[1] is selected.masks[2] is extended.masks[1]
    assert [one.shape for one in selected] == [extended[i].shape for i in (3, 1, 1)]
    copied = copy.deepcopy(selected)
    assert torch.equal(copied.masks[1], selected.masks[1])


def test_folder_extends_a_group_with_masks(execute, group, folders, base) -> None:
    from PIL import Image

    (base / "input" / "a").mkdir()
    Image.new("RGB", (30, 30)).save(base / "input" / "a" / "0.png")
    extended = execute("EasyRefGroupFromFolder", "a", 10, 0, group=group([LEFT] * 3).result[0]).result[0]
    assert [mask is not None for mask in extended.masks] == [True] * 3 + [False]


def test_crops_have_their_part_of_the_mask(execute, group) -> None:
    images = {"image0": [torch.rand(1, 40, 80, 3)], "image1": [torch.rand(1, 60, 60, 3)]}
    mask = torch.rand(40, 80)
    masked = execute("EasyRefGroup", images, masks=[mask, LEFT]).result[0]
    crops = execute("EasyRefCropReference", [masked], ["square in the middle"]).result[0]
    assert torch.equal(crops.masks[0], mask[:, 20:60])
    assert crops.masks[1] is not None
    plain = execute("EasyRefCropReference", [REFERENCES], ["square in the middle"]).result[0]
    assert plain.masks == (None,) * 3


def test_influence_uses_the_masks(easy, execute, group) -> None:
    inputs = "a cat", golden.instruction(easy.pack), golden.SIZE
    zero = [torch.ones(8, 8), torch.zeros(8, 8), torch.ones(8, 8)]
    reports = [
        execute("EasyRefReferenceInfluence", easy.easyref, group(masks).result[0], *inputs)
        for masks in (None, zero)
    ]
    assert reports[0].result[1] != reports[1].result[1]
    assert reports[1].result[3].masks[1] is not None


def test_attention_outside_the_mask_is_0(easy, execute, group) -> None:
    masked = group([LEFT] * 3).result[0]
    settings = "a cat", golden.instruction(easy.pack), golden.SIZE
    context = execute("EasyRefEncodeGroup", easy.easyref, masked, *settings).result[0]
    shares = easy.easyref.attention(context, -1)
    for heat, (_, columns) in zip(shares.maps, context.token_grids, strict=True):
        assert (heat[:, (columns + 1) // 2 :] == 0).all()
        assert (heat[:, : columns // 2] > 0).all()


def test_group_shows_its_masks(pack, group) -> None:
    assert "marks nothing" not in text_of(group([LEFT] * 3))
    lines = text_of(group([LEFT, torch.zeros(64, 64), LEFT])).splitlines()
    (warning,) = (line for line in lines if "marks nothing" in line)
    assert warning.startswith("Warning: the mask of reference 2 marks nothing, so nothing of it counts.")

    cell = golden.part(pack, "nodes.host.preview").cell
    image = torch.ones(1, 64, 64, 3)
    left, right = cell(image, LEFT).getpixel((2, 2)), cell(image, LEFT).getpixel((60, 2))
    assert (left, right) == ((255,) * 3, (51,) * 3)
    assert cell(image, None).getpixel((60, 2)) == (255,) * 3
    assert cell(image, torch.full((4, 4), torch.nan)) is None  # the encoder refuses it


def masked_graph(value: float | None) -> graphs.Graph:
    """The whole path, with a mask of one value for the first reference."""
    graph = graphs.easyref()
    graph["first"] = graphs.group(["image0", 0])
    graph["group"] = graphs.group(["image1", 0], ["image2", 0], group=["first", 0])
    if value is not None:
        graph["mask"] = graphs.node("SolidMask", value=value, width=32, height=32)
        graph["first"]["inputs"]["masks"] = ["mask", 0]
    return graph


def test_image_follows_the_mask(server) -> None:
    found = {value: graphs.image(server, masked_graph(value)) for value in (None, 1.0, 0.5, 0.0)}
    assert found[None] == found[1.0] == graphs.image(server, graphs.easyref())
    assert len(set(found.values())) == 3
    assert graphs.image(server, masked_graph(0.5)) == found[0.5]
