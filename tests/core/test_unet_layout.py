"""The addresses of SDXL's cross-attentions: 70 of them, and the same site under every name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from easyref_core.unet.layout import (
    Site,
    in_processor_order,
    parse_comfy,
    parse_diffusers,
    require_fit,
    sdxl_sites,
)

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Four of the 70, under the names that diffusers and ComfyUI have for them.
SAME = [
    ("down_blocks.1.attentions.0.transformer_blocks.1", "input_blocks.4.1.transformer_blocks.1"),
    ("down_blocks.2.attentions.1.transformer_blocks.9", "input_blocks.8.1.transformer_blocks.9"),
    ("mid_block.attentions.0.transformer_blocks.3", "middle_block.1.transformer_blocks.3"),
    ("up_blocks.1.attentions.2.transformer_blocks.0", "output_blocks.5.1.transformer_blocks.0"),
]


def test_sdxl_has_70_sites() -> None:
    assert len(set(sdxl_sites())) == len(sdxl_sites()) == 70


@pytest.mark.parametrize(("diffusers", "comfy"), SAME)
def test_both_names_are_the_same_site(diffusers: str, comfy: str) -> None:
    assert parse_diffusers(diffusers) == parse_comfy(comfy)


def test_diffusers_names_lead_back_to_the_sites() -> None:
    names = [f"{site.diffusers}.attn2.processor" for site in sdxl_sites()]
    assert [parse_diffusers(name) for name in names] == sdxl_sites()


def test_comfy_names_lead_back_to_the_sites() -> None:
    names = [f"{site.comfy}.attn2" for site in sdxl_sites()]
    assert [parse_comfy(name) for name in names] == sdxl_sites()


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.1.resnets.0.conv1",
        "conv_in",
        "mid_block.attentions.0.norm",
        "transformer_blocks.1.attn2",
        "",
    ],
)
def test_other_diffusers_paths_are_no_site(path: str) -> None:
    assert parse_diffusers(path) is None


@pytest.mark.parametrize(
    "path", ["input_blocks.4.0.in_layers.0", "middle_block.0", "double_blocks.1.img_attn"]
)
def test_other_comfy_paths_are_no_site(path: str) -> None:
    assert parse_comfy(path) is None


def test_the_sites_are_already_in_processor_order() -> None:
    assert in_processor_order(reversed(sdxl_sites())) == sdxl_sites()


def test_blocks_of_ten_and_more_are_in_numerical_order() -> None:
    sites = [Site("input", 4, 10), Site("input", 4, 9), Site("input", 10, 0), Site("input", 9, 0)]
    assert in_processor_order(sites) == [sites[1], sites[0], sites[3], sites[2]]


def cross_attentions(unet: UNet2DConditionModel) -> list[Site]:
    return [parse_diffusers(name) for name in unet.attn_processors if ".attn2." in name]


def test_sites_of_the_tiny_unet(unet: UNet2DConditionModel) -> None:
    assert cross_attentions(unet) == sdxl_sites(((0, 1, 2), 2, (2, 1, 0)))


@pytest.mark.parametrize(
    ("depths", "sites"),
    [
        (((0, 1, 1), 1, (1, 1, 0)), 11),
        (((0, 3, 2), 2, (2, 3, 0)), 27),
        (((0, 2, 4), 4, (4, 2, 0)), 34),
    ],
)
def test_sites_of_a_unet_of_other_depths(depths: tuple, sites: int) -> None:
    unet = sdxl_shaped(depths[0])
    assert cross_attentions(unet) == sdxl_sites(depths)
    assert len(cross_attentions(unet)) == sites


def sdxl_shaped(depths: tuple[int, ...]) -> UNet2DConditionModel:
    """A UNet of SDXL's shape with so many transformer blocks per attention, without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(32, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=tuple(max(1, depth) for depth in depths),
            attention_head_dim=8,
            cross_attention_dim=32,
            use_linear_projection=True,
        )


def test_the_same_cross_attentions_fit() -> None:
    require_fit("The UNet", {Site("middle", 0, 0): 640}, {Site("middle", 0, 0): 640})


def test_another_width_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"1 cross-attentions \(1 x 320 wide\).*1 cross-attentions \(1 x 640 wide\)"
    ):
        require_fit("The UNet", {Site("middle", 0, 0): 320}, {Site("middle", 0, 0): 640})


def test_the_same_number_at_other_places_does_not_fit() -> None:
    with pytest.raises(ValueError, match="The UNet does not fit"):
        require_fit("The UNet", {Site("middle", 0, 0): 640}, {Site("middle", 0, 1): 640})
