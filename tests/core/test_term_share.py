"""The share of the reference term in an attention's output."""

from __future__ import annotations

import pytest
import torch

from easyref_core.inspect.reference_share import Recorder, ShareKey
from easyref_core.unet.layout import Site

SITE = Site("middle", 0, 0)


def recorded(recorder: Recorder, unconditional=(True, False), tokens: int = 6, sigma: float = 1.0) -> tuple:
    """One call with random terms: (term, attention), each (runs, tokens, 4)."""
    term, attention = torch.randn(2, len(unconditional), tokens, 4)
    recorder.record(sigma, SITE, unconditional, term, attention, (2, tokens // 2))
    return term, attention


def test_shares_of_both_sides() -> None:
    recorder = Recorder()
    term, attention = recorded(recorder)
    shares = recorder.shares()
    assert shares.keys() == {ShareKey(1.0, SITE, True), ShareKey(1.0, SITE, False)}
    for run, is_unconditional in enumerate((True, False)):
        share = shares[1.0, SITE, is_unconditional]
        assert share.share == pytest.approx((term[run].norm() / attention[run].norm()).item())
        wanted = (term[run].norm(dim=-1) / attention[run].norm(dim=-1)).reshape(2, 3)
        torch.testing.assert_close(share.grid, wanted)


def test_calls_at_one_sigma_add_up() -> None:
    apart, together = Recorder(), Recorder()
    pairs = [recorded(apart, (False,)) for _ in range(2)]
    term, attention = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    together.record(1.0, SITE, (False, False), term, attention, (2, 3))
    (found,), (wanted,) = apart.shares().values(), together.shares().values()
    assert found.share == pytest.approx(wanted.share)
    torch.testing.assert_close(found.grid, wanted.grid)


def test_steps_come_in_the_order_of_sampling() -> None:
    recorder = Recorder()
    for sigma in (1.0, 5.0, 0.1):
        recorded(recorder, sigma=sigma)
    assert [moment.sigma for moment in recorder.shares()][::2] == [5.0, 1.0, 0.1]


def test_largest_latent_is_given() -> None:
    recorder = Recorder()
    for tokens in (6, 12, 4):
        recorded(recorder, tokens=tokens)
    assert {share.grid.shape for share in recorder.shares().values()} == {(2, 6)}


def test_tokens_of_another_number_are_one_row() -> None:
    recorder = Recorder()
    recorder.record(1.0, SITE, (False,), torch.ones(1, 5, 4), torch.ones(1, 5, 4), (2, 3))
    (share,) = recorder.shares().values()
    assert share.share == 1
    assert share.grid.tolist() == [[1.0] * 5]


def test_no_term_is_no_share() -> None:
    recorder = Recorder()
    recorder.record(1.0, SITE, (False,), torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), (2, 3))
    assert [share.share for share in recorder.shares().values()] == [0.0]


def test_cleared() -> None:
    recorder = Recorder()
    recorded(recorder)
    recorder.clear()
    assert recorder.shares() == {}
