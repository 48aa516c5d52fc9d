"""Recorded shares, by block and step and by place."""

from __future__ import annotations

import pytest
import torch

from easyref_core.inspect.reference_share import Share, ShareKey
from easyref_core.inspect.where_it_acts import by_block_and_step, by_place, short_name
from easyref_core.unet.layout import Site, sdxl_sites


def recorded(*entries: tuple[float, Site, float, torch.Tensor]) -> dict[ShareKey, Share]:
    return {ShareKey(sigma, site, False): Share(share, grid) for sigma, site, share, grid in entries}


GRID = torch.ones(2, 2)


def test_sdxl_has_11_blocks_in_the_order_of_the_unet() -> None:
    blocks, *_ = by_block_and_step(recorded(*((1.0, site, 0.1, GRID) for site in sdxl_sites())))
    assert [short_name(block) for block in blocks] == [
        *("in 4", "in 5", "in 7", "in 8", "mid"),
        *(f"out {i}" for i in range(6)),
    ]


def test_value_is_the_mean_of_a_blocks_sites_and_steps_fall() -> None:
    early, late = Site("input", 4, 0), Site("input", 4, 1)
    shares = recorded((1.0, early, 0.2, GRID), (9.0, early, 0.4, GRID), (9.0, late, 0.8, GRID))
    _, sigmas, values = by_block_and_step(shares)
    assert sigmas == [9.0, 1.0]
    assert values.flatten().tolist() == pytest.approx([0.6, 0.2])


def test_step_without_a_term_is_not_a_number() -> None:
    shares = recorded((9.0, Site("input", 4, 0), 0.2, GRID), (1.0, Site("middle", 0, 0), 0.3, GRID))
    assert by_block_and_step(shares)[2].isnan().tolist() == [[False, True], [True, False]]


def test_places_are_means_at_the_finest_grid() -> None:
    fine = torch.tensor([[0.0, 0.0], [0.4, 0.4]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    coarse = torch.full((2, 2), 0.2)
    shares = recorded((1.0, Site("input", 4, 0), 0.1, fine), (1.0, Site("middle", 0, 0), 0.1, coarse))
    found = by_place(shares)
    assert torch.allclose(found, torch.tensor([0.1, 0.1, 0.3, 0.3])[:, None].expand(4, 4))


def test_tokens_without_places_are_left_out() -> None:
    row = Share(0.5, torch.full((1, 64), 9.0))
    shares = {**recorded((1.0, Site("input", 4, 0), 0.1, GRID))}
    shares[ShareKey(1.0, Site("input", 5, 0), False)] = row
    assert torch.equal(by_place(shares), GRID)
