"""Order of a stream: rows once an epoch over all partitions, sources by weight, batches of one size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from easyref_core.training.stream_order import RowKey, StreamOrder, apportion, in_batches

SIZES = np.array([4, 4, 3, 4, 4, 2, 4])  # rows of the row groups of one source
ROWS = int(SIZES.sum())


def order(*sources: np.ndarray, **changes: object) -> StreamOrder:
    options = {"partitions": 1, "buffer": 8, "batch_size": 2, "seed": 0} | changes
    return StreamOrder(sources or (SIZES,), **options)


def blocks(order: StreamOrder, partition: int, stop: int) -> list[RowKey]:
    return [key for number in range(stop) for key in order.block(partition, number)]


@pytest.mark.parametrize("partitions", [1, 2, 3, 10])
def test_each_epoch_has_each_row_once_over_all_partitions(partitions: int) -> None:
    stream = order(partitions=partitions)
    keys = [key for partition in range(partitions) for key in blocks(stream, partition, 12)]
    assert len(set(keys)) == len(keys)
    every = {(group, row) for group, size in enumerate(SIZES) for row in range(size)}
    complete = min(max(key.epoch for key in blocks(stream, p, 12)) for p in range(partitions))
    assert complete >= 1
    for epoch in range(complete):  # every partition is beyond these
        assert {(key.row_group, key.row) for key in keys if key.epoch == epoch} == every


def test_partition_reads_whole_row_groups_of_a_shuffled_epoch() -> None:
    stream = order(buffer=ROWS, batch_size=1)
    first, second = (stream.block(0, number) for number in (0, 1))
    assert {key.epoch for key in first} == {0}
    assert {key.epoch for key in second} == {1}
    assert [key[2:] for key in first] != [key[2:] for key in second]
    assert first != sorted(first)


def test_seed_decides_the_order() -> None:
    assert order().block(0, 1) == order().block(0, 1)
    assert order().block(0, 1) != order(seed=1).block(0, 1)


def test_block_does_not_depend_on_those_read_before() -> None:
    stream = order(partitions=2)
    expected = [stream.block(1, number) for number in range(9)]
    assert order(partitions=2).block(1, 8) == expected[8]
    assert stream.block(1, 3) == expected[3]


def test_positions_are_batches_of_partitions_in_turn() -> None:
    stream = order(partitions=3)  # batches of 2, 4 of them in a block
    locations = [tuple(stream.locate(position)) for position in range(2 * 3 * 5)]
    assert locations[:8] == [
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (1, 0, 0, 0),
        (1, 0, 0, 1),
        (2, 0, 0, 0),
        (2, 0, 0, 1),
        (0, 0, 1, 0),
        (0, 0, 1, 1),
    ]
    assert locations[2 * 3 * 4] == (0, 1, 0, 0)


def test_buffer_is_rounded_up_to_whole_batches() -> None:
    assert len(order(buffer=7, batch_size=3).block(0, 0)) == 9


def test_sources_are_mixed_by_weight_in_every_block() -> None:
    stream = order(SIZES, SIZES, np.array([50] * 4), weights=[3, 1, 6], buffer=20)
    for number in range(30):
        counts = Counter(key.source for key in stream.block(0, number))
        assert counts == {0: 6, 1: 2, 2: 12}


def test_without_weights_every_row_is_given_equally_often() -> None:
    small, large = np.array([5]), np.array([50] * 4)
    stream = order(small, large, buffer=41, batch_size=1)
    keys = blocks(stream, 0, 5 * 5)
    counts = Counter((key.source, key.row_group, key.row) for key in keys)
    assert len(counts) == 205
    assert set(counts.values()) == {5}


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [1e-4, 1, 3], [1, 1, 1, 1, 50]])
def test_shares_follow_the_weights_and_never_fall(weights: list[float]) -> None:
    before = [0] * len(weights)
    for total in range(300):
        shares = apportion(total, weights)
        assert sum(shares) == total
        exact = [total * weight / sum(weights) for weight in weights]
        assert all(abs(a - b) <= len(weights) / 2 for a, b in zip(shares, exact, strict=True))
        assert all(a >= b for a, b in zip(shares, before, strict=True))
        before = shares


def test_batches_have_one_size_and_similar_numbers_of_tokens() -> None:
    rng = np.random.default_rng(0)
    kinds = [(64, 64), (64, 128), (128, 64)]
    sizes = [(kinds[rng.integers(3)], int(rng.integers(100))) for _ in range(60)]
    batches = in_batches(sizes, 4, rng)
    assert sorted(i for batch, _ in batches for i in batch) == list(range(60))
    assert all(len(batch) == 4 for batch, _ in batches)
    mixed = [(batch, size) for batch, size in batches if len({sizes[i][0] for i in batch}) > 1]
    assert len(mixed) <= 3  # at most 3 rows of each size are left
    for batch, size in mixed:
        counts = Counter(sizes[i][0] for i in batch)
        assert counts[size] == max(counts.values())
    pure = [(batch, size) for batch, size in batches if (batch, size) not in mixed]
    assert all(sizes[i][0] == size for batch, size in pure for i in batch)
    spans = [max(t) - min(t) for t in ([sizes[i][1] for i in batch] for batch, _ in pure)]
    assert np.mean(spans) < 40  # 60 in random batches of four
    assert [batch for batch, _ in batches] != sorted(batch for batch, _ in batches)


def test_rows_of_unknown_size_take_that_of_the_others() -> None:
    sizes = [((64, 64), 1), None, ((64, 64), 2), None, None, ((64, 128), 3)]
    batches = in_batches(sizes, 2, np.random.default_rng(0))
    assert sorted(i for batch, _ in batches for i in batch) == list(range(6))
    assert all(size in {(64, 64), (64, 128)} for _, size in batches)
    assert in_batches([None, None], 2, np.random.default_rng(0)) == [([0, 1], None)]
