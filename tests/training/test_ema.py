"""Moving average of the trained weights: by hand, in the exported checkpoint, and over a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from easyref_core.training.ema import EMA
from easyref_core.training.export import export
from easyref_core.training.loop import train
from easyref_core.training.resume import saved_states

from . import tiny
from .tiny import TinyExamples


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_average_is_that_of_the_definition() -> None:
    """The decay is (1 + n) / (10 + n) up to its limit; frozen parameters have no average."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([parameter, torch.nn.Parameter(torch.ones(1), requires_grad=False)], decay=0.15)
    expected = 1.0
    for value, decay in ((3.0, 0.1), (-1.0, 0.15), (2.0, 0.15)):
        parameter.data.fill_(value)
        assert ema.decay == pytest.approx(decay)
        ema.update()
        expected = decay * expected + (1 - decay) * value
        assert [average.item() for average in ema.averages] == pytest.approx([expected])


def test_average_of_bfloat16_is_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA([parameter], decay=0.9999)
    ema.updates = 10**6
    parameter.data.fill_(2.0)
    ema.update()
    assert ema.averages[0].item() == pytest.approx(1.0001)


def test_weights_come_back_even_after_an_error() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([parameter], decay=0.5)
    parameter.data.fill_(5.0)
    applied = ema.applied()
    applied.__enter__()
    assert parameter.item() == 1.0
    assert not applied.__exit__(KeyError, KeyError(), None)
    assert parameter.item() == 5.0


def test_checkpoint_has_the_average_and_a_resume_keeps_it(
    base_folder: Path, tmp_path: Path, examples: TinyExamples
) -> None:
    plain = tiny.settings(base_folder, output=tmp_path / "plain", updates=4, save_every=2)
    averaged, resumed = (
        tiny.settings(base_folder, output=tmp_path / name, updates=4, save_every=2, ema=0.3)
        for name in ("averaged", "resumed")
    )
    for settings in (plain, averaged, resumed):
        train(settings, examples)
    assert not same(plain.result, averaged.result)
    assert same(plain.result, export(averaged, 4, tmp_path / "raw.safetensors", raw=True))
    assert same(averaged.result, export(averaged, 4, tmp_path / "average.safetensors"))
    # as if the run had been killed after its second update
    resumed.result.unlink()
    newest = saved_states(resumed.output).pop(4)
    newest.rename(newest.with_name("removed"))
    train(resumed, examples)
    assert same(averaged.result, resumed.result)
