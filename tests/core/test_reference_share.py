"""Reference shares: recording, and aggregation by block, step and position."""

from __future__ import annotations

import pytest
import torch

from easyref_core.inspect.reference_share import (
    Recorder,
    Share,
    ShareKey,
    block_label,
    share_by_block_and_step,
    share_map,
    share_masks,
)
from easyref_core.unet.layout import Site, sdxl_sites

SITE = Site("middle", 0, 0)


def record(recorder: Recorder, unconditional=(True, False), tokens: int = 6, sigma: float = 1.0) -> tuple:
    """Record one call with random terms: (term, attention), each (runs, tokens, 4)."""
    term, attention = torch.randn(2, len(unconditional), tokens, 4)
    recorder.record(sigma, SITE, unconditional, term, attention, (2, tokens // 2))
    return term, attention


def test_shares_of_both_branches() -> None:
    recorder = Recorder()
    term, attention = record(recorder)
    shares = recorder.shares()
    assert shares.keys() == {ShareKey(1.0, SITE, True), ShareKey(1.0, SITE, False)}
    for run, is_unconditional in enumerate((True, False)):
        share = shares[1.0, SITE, is_unconditional]
        assert share.share == pytest.approx((term[run].norm() / attention[run].norm()).item())
        expected = (term[run].norm(dim=-1) / attention[run].norm(dim=-1)).reshape(2, 3)
        torch.testing.assert_close(share.grid, expected)


def test_calls_at_one_sigma_add_up() -> None:
    apart, together = Recorder(), Recorder()
    pairs = [record(apart, (False,)) for _ in range(2)]
    term, attention = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    together.record(1.0, SITE, (False, False), term, attention, (2, 3))
    (summed,), (single,) = apart.shares().values(), together.shares().values()
    assert summed.share == pytest.approx(single.share)
    torch.testing.assert_close(summed.grid, single.grid)


def test_steps_are_in_the_order_of_sampling() -> None:
    recorder = Recorder()
    for sigma in (1.0, 5.0, 0.1):
        record(recorder, sigma=sigma)
    assert [key.sigma for key in recorder.shares()][::2] == [5.0, 1.0, 0.1]


def test_only_the_largest_latent_is_returned() -> None:
    recorder = Recorder()
    for tokens in (6, 12, 4):
        record(recorder, tokens=tokens)
    assert {share.grid.shape for share in recorder.shares().values()} == {(2, 6)}


def test_tokens_of_unknown_grid_are_one_row() -> None:
    recorder = Recorder()
    recorder.record(1.0, SITE, (False,), torch.ones(1, 5, 4), torch.ones(1, 5, 4), (2, 3))
    (share,) = recorder.shares().values()
    assert share.share == 1
    assert share.grid.tolist() == [[1.0] * 5]


def test_zero_term_is_a_share_of_0() -> None:
    recorder = Recorder()
    recorder.record(1.0, SITE, (False,), torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), (2, 3))
    assert [share.share for share in recorder.shares().values()] == [0.0]


def test_clear() -> None:
    recorder = Recorder()
    record(recorder)
    recorder.clear()
    assert recorder.shares() == {}


GRID = torch.ones(2, 2)


def shares_of(*entries: tuple[float, Site, float, torch.Tensor]) -> dict[ShareKey, Share]:
    return {ShareKey(sigma, site, False): Share(share, grid) for sigma, site, share, grid in entries}


def test_sdxl_has_11_blocks_in_unet_order() -> None:
    blocks, *_ = share_by_block_and_step(shares_of(*((1.0, site, 0.1, GRID) for site in sdxl_sites())))
    labels = ["in 4", "in 5", "in 7", "in 8", "mid", *(f"out {i}" for i in range(6))]
    assert [block_label(block) for block in blocks] == labels


def test_value_is_the_mean_over_a_blocks_sites_and_sigmas_fall() -> None:
    early, late = Site("input", 4, 0), Site("input", 4, 1)
    shares = shares_of((1.0, early, 0.2, GRID), (9.0, early, 0.4, GRID), (9.0, late, 0.8, GRID))
    _, sigmas, values = share_by_block_and_step(shares)
    assert sigmas == [9.0, 1.0]
    assert values.flatten().tolist() == pytest.approx([0.6, 0.2])


def test_step_without_a_term_is_nan() -> None:
    shares = shares_of((9.0, Site("input", 4, 0), 0.2, GRID), (1.0, Site("middle", 0, 0), 0.3, GRID))
    assert share_by_block_and_step(shares)[2].isnan().tolist() == [[False, True], [True, False]]


def test_map_is_the_mean_at_the_finest_grid_without_single_rows() -> None:
    fine = torch.tensor([[0.0, 0.0], [0.4, 0.4]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    coarse, row = torch.full((2, 2), 0.2), torch.full((1, 64), 9.0)
    sites = Site("input", 4, 0), Site("middle", 0, 0), Site("input", 5, 0)
    shares = shares_of(
        *((1.0, site, 0.1, grid) for site, grid in zip(sites, (fine, coarse, row), strict=True))
    )
    expected = torch.tensor([0.1, 0.1, 0.3, 0.3])[:, None].expand(4, 4)
    assert torch.allclose(share_map(shares), expected)


def test_masks_have_one_size_and_a_maximum_of_1() -> None:
    site = Site("middle", 0, 0)
    masks = share_masks([shares_of((1.0, site, 0.1, grid)) for grid in (2 * GRID, torch.rand(4, 6))])
    assert masks.shape == (2, 4, 6)
    assert masks.amax(dim=(1, 2)).tolist() == [1, 1]
