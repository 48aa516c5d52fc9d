"""The addresses of SDXL's 70 cross-attentions, in diffusers and in ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devkit import golden
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

SITE, OTHER_SITE = Site("middle", 0, 0), Site("middle", 0, 1)


@pytest.mark.parametrize(
    ("diffusers", "comfy"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.1", "input_blocks.4.1.transformer_blocks.1"),
        ("down_blocks.2.attentions.1.transformer_blocks.9", "input_blocks.8.1.transformer_blocks.9"),
        ("mid_block.attentions.0.transformer_blocks.3", "middle_block.1.transformer_blocks.3"),
        ("up_blocks.1.attentions.2.transformer_blocks.0", "output_blocks.5.1.transformer_blocks.0"),
    ],
)
def test_both_paths_are_the_same_site(diffusers: str, comfy: str) -> None:
    assert parse_diffusers(diffusers) == parse_comfy(comfy)


def test_paths_of_the_70_sites_parse_to_the_sites() -> None:
    sites = sdxl_sites()
    assert len(set(sites)) == len(sites) == 70
    assert [parse_diffusers(f"{site.diffusers}.attn2.processor") for site in sites] == sites
    assert [parse_comfy(f"{site.comfy}.attn2") for site in sites] == sites


@pytest.mark.parametrize(
    ("parse", "path"),
    [
        (parse_diffusers, "down_blocks.1.resnets.0.conv1"),
        (parse_diffusers, "conv_in"),
        (parse_diffusers, "mid_block.attentions.0.norm"),
        (parse_diffusers, "transformer_blocks.1.attn2"),
        (parse_diffusers, ""),
        (parse_comfy, "input_blocks.4.0.in_layers.0"),
        (parse_comfy, "middle_block.0"),
        (parse_comfy, "double_blocks.1.img_attn"),
    ],
)
def test_other_paths_are_not_sites(parse, path: str) -> None:
    assert parse(path) is None


def test_processor_order() -> None:
    assert in_processor_order(reversed(sdxl_sites())) == sdxl_sites()
    numerical = [Site("input", 4, 9), Site("input", 4, 10), Site("input", 9, 0), Site("input", 10, 0)]
    assert in_processor_order(reversed(numerical)) == numerical


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
    down = "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"
    layers = [max(1, depth) for depth in depths[0]]
    unet = golden.empty_unet(down, (32, 32, 32), layers, use_linear_projection=True)
    assert cross_attentions(unet) == sdxl_sites(depths)
    assert len(cross_attentions(unet)) == sites


def test_unet_must_fit() -> None:
    require_fit("The UNet", {SITE: 640}, {SITE: 640})
    widths = r"does not fit.*1 cross-attentions \(1 x 320 wide\).*1 cross-attentions \(1 x 640 wide\)"
    with pytest.raises(ValueError, match=widths):
        require_fit("The UNet", {SITE: 320}, {SITE: 640})
    places = r"has .*, among them \S+blocks.0, 640 wide,.* for .*, among them \S+blocks.1, 640 wide\."
    with pytest.raises(ValueError, match=places):
        require_fit("The UNet", {SITE: 640}, {OTHER_SITE: 640})
    with pytest.raises(ValueError, match="among them .*blocks.0, 640 wide,.*blocks.0, 320 wide"):
        require_fit("The UNet", {SITE: 640, OTHER_SITE: 320}, {SITE: 320, OTHER_SITE: 640})
