"""The stream of positions, and collating samples into a batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

import easyref_core as er
from devkit.hosts import ROOT
from easyref_core.training.batches import (
    Batch,
    MicroBatches,
    Sample,
    collate,
    generator,
    loader,
    new_seed,
    pad_left,
    row_at,
    stream,
)

from . import tiny


def sample(number: int = 0, length: int = 3, references: int = 1, size: tuple[int, int] = (8, 8)) -> Sample:
    """A sample whose values are all `number`."""
    return Sample(
        target=torch.full((3, *size), float(number)),
        prompt=f"prompt {number}",
        patches=torch.full((4 * references, 6), float(number)),
        grid=torch.tensor([[1, 2, 2]] * references),
        input_ids=torch.arange(1, length + 1) + 10 * number,
        original_size=(20, 30),
        crop=(1, 2),
        target_size=size,
    )


class Positions:
    """Examples whose samples are their positions."""

    def __len__(self) -> int:
        return 5

    def batch(self, positions: Sequence[int]) -> Batch:
        return collate([sample(p) for p in positions], [new_seed(generator(p, 0)) for p in positions])


def load(steps: range, workers: int = 0, **ranks: int) -> list[Batch]:
    return list(loader(MicroBatches(Positions(), 2, **ranks), steps, workers))


def positions(batches: Sequence[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.pixels[:, 0, 0, 0]]


@pytest.mark.parametrize("length", [1, 7, 100])
def test_epoch_visits_each_row_once(length: int) -> None:
    for epoch in range(3):
        epoch_positions = range(epoch * length, (epoch + 1) * length)
        assert sorted(row_at(p, length, seed=3) for p in epoch_positions) == list(range(length))


def test_each_epoch_and_seed_has_another_order() -> None:
    orders = [[row_at(p, 50, seed) for p in range(50 * e, 50 * e + 50)] for seed in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_draws_depend_only_on_position_and_seed() -> None:
    assert new_seed(generator(5, 1)) == new_seed(generator(5, 1))
    assert len({new_seed(generator(p, s)) for p in range(50) for s in range(2)}) == 100


def test_ranks_together_take_the_positions_of_one_rank_with_the_total_batch() -> None:
    one = [p for step in range(10) for p in stream(step, 12)]
    assert [p for step in range(10) for rank in range(3) for p in stream(step, 4, rank, 3)] == one
    assert one == list(range(120))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order(workers: int) -> None:
    batches = load(range(6, 18), workers)
    assert positions(batches) == list(range(12, 36))
    assert all(torch.equal(a.seeds, b.seeds) for a, b in zip(batches, load(range(6, 18)), strict=True))


def test_loader_of_a_rank() -> None:
    assert positions(load(range(3), rank=1, world_size=2)) == [2, 3, 6, 7, 10, 11]


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = pad_left([torch.tensor([7, 8, 9]), torch.tensor([5]), torch.tensor([6, 4])])
    assert ids.tolist() == [[7, 8, 9], [5, 5, 5], [6, 6, 4]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]


def test_collate() -> None:
    batch = collate([sample(0, 3, references=2), sample(1, 2)], [4, 2**62])
    assert batch.pixels.shape == (2, 3, 8, 8)
    assert batch.latents is None
    assert batch.prompts == ("prompt 0", "prompt 1")
    assert batch.time_ids.tolist() == [[20, 30, 1, 2, 8, 8]] * 2
    assert batch.patches[:, 0].tolist() == [0] * 8 + [1] * 4
    assert batch.grid.shape == (3, 3)
    assert batch.references == (2, 1)
    assert batch.input_ids.tolist() == [[1, 2, 3], [11, 11, 12]]
    assert batch.padding_mask.tolist() == [[True] * 3, [False, True, True]]
    assert batch.seeds.tolist() == [4, 2**62]


def test_targets_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="The targets of one batch have different sizes") as error:
        collate([sample(size=(64, 128)), sample(size=(128, 64))], [0, 0])
    assert "64x128, 128x64" in str(error.value)
    assert "set batch_size to 1 and raise accumulation" in str(error.value)


def test_batch_moves_to_a_device() -> None:
    batch = collate([sample()], [0]).to("meta")
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.prompts == ("prompt 0",)
    assert batch.latents is None


@torch.no_grad()
def test_padded_batch_has_the_tokens_of_each_group_alone(examples: tiny.TinyExamples) -> None:
    model = er.load(tiny.GOLDEN / "easyref.safetensors", tiny.MLLM)
    rows = [0, 1, 2, 5]  # groups of 1, 2, 3 and 3 references
    batch = collate([examples.sample(row) for row in rows], rows)
    assert not batch.padding_mask.all()
    for row, tokens in zip(rows, golden_tokens(model, batch), strict=True):
        alone = golden_tokens(model, collate([examples.sample(row)], [0]))[0]
        torch.testing.assert_close(tokens, alone, rtol=1e-5, atol=1e-5)


def golden_tokens(model: er.EasyRef, batch: Batch) -> torch.Tensor:
    """Reference tokens (B, T, C) of a batch from the golden model."""
    encoder, aggregator = model.mllm.encoder, model.mllm.aggregator
    inputs = batch.patches, batch.grid, batch.input_ids, model.image_token, torch.float32
    return aggregator(encoder(*inputs, padding_mask=batch.padding_mask), batch.padding_mask)


LEFT = """
import gc, sys, types
import torch
from easyref_core.training.batches import loader

batches = loader(torch.arange(9), range(9), workers=1)
assert next(batches) == 0
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("own = types.SimpleNamespace(batches=batches); own.me = own; del batches, own; gc.collect()", 0),
    ],
    ids=["kept", "failed", "collected in a cycle"],
)
def test_processes_that_are_left_do_not_keep_the_program_from_ending(end: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT + end], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "DataLoader worker" not in done.stderr
