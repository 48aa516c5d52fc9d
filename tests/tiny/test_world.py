"""The tiny world: its pictures, its groups, and the examples made of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from easyref_core.tiny.dataset import draw_pool
from easyref_core.tiny.demo_group import demo_group, in_common
from easyref_core.tiny.groups import groups_to_judge, plan_group, spread
from easyref_core.tiny.images import (
    ATTRIBUTES,
    COUNTS,
    NAMES,
    PICTURE,
    caption,
    every_picture,
    held_out,
    render,
)


def plans(count: int, references: int, **options: object) -> list:
    rng = np.random.default_rng(0)
    return [plan_group(rng, references, **options) for _ in range(count)]


def test_one_triple_in_five_is_held_out_and_every_value_is_in_both_parts():
    every = every_picture()
    kept = held_out(every)
    assert 0.18 < kept.mean() < 0.22
    for part in (every[kept], every[~kept]):
        assert [len(np.unique(column)) for column in part.T] == list(COUNTS)


def test_pictures_come_from_the_seed_alone_and_differ_within_a_combination():
    attributes = np.repeat(every_picture()[:1], 3, axis=0)
    first, again = (render(attributes, np.random.default_rng(5)) for _ in range(2))
    assert first.shape == (3, PICTURE, PICTURE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_each_attribute_shows_in_the_picture():
    base = np.zeros(5, dtype=int)
    for column, count in enumerate(COUNTS):
        attributes = np.repeat(base[None], count, axis=0)
        attributes[:, column] = np.arange(count)
        drawn = [render(row[None], np.random.default_rng(0))[0].astype(int) for row in attributes]
        for one in range(count):
            for other in range(one):
                assert np.abs(drawn[one] - drawn[other]).mean() > 2, NAMES[column]


def test_caption_names_what_is_asked_for():
    assert caption([0, 0, 1, 0, 1]) == "a red striped circle on sand at the left"
    assert caption([0, 0, 1, 0, 1], ["background"]) == "a thing on sand"
    assert caption([0, 0, 1, 0, 1], []) == ""


def test_no_word_stands_for_two_values():
    words = [word for values in ATTRIBUTES.values() for word in values]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("references", [2, 3, 6])
def test_group_shares_what_it_says_and_nothing_else(references):
    for plan in plans(100, references, outsider=False):
        for column, name in enumerate(NAMES):
            values = set(plan.references[:, column].tolist())
            if name in plan.shared:
                assert values == {plan.target[column]}
            else:
                assert len(values) == min(references, COUNTS[column])
        assert not set(plan.shared) & set(plan.named)


def test_outsider_shares_nothing():
    for plan in plans(50, 5, outsider=True):
        for name in plan.shared:
            column = plan.references[:, NAMES.index(name)]
            assert column[plan.outsider] != plan.target[NAMES.index(name)]
            assert (np.delete(column, plan.outsider) == plan.target[NAMES.index(name)]).all()


def test_training_never_sees_a_held_out_triple():
    for plan in plans(300, 4):
        assert not held_out(plan.target)
        assert not held_out(plan.references).any()
    assert not held_out(draw_pool(0, 1).attributes).any()


def test_judged_groups_have_held_out_targets_name_something_and_are_of_all_sizes():
    judged = list(groups_to_judge(3, 100))
    assert all(held_out(plan.target) and plan.named for plan in judged)
    assert Counter(len(plan.references) for plan in judged) == dict.fromkeys(range(2, 7), 20)
    assert 3 < sum(plan.outsider is not None for plan in judged) < 25


def test_spread_repeats_no_value_before_all_have_occurred():
    drawn = Counter(spread(np.random.default_rng(0), 4, 6).tolist())
    assert sorted(drawn.values()) == [1, 1, 2, 2]


def test_pool_finds_pictures_of_the_attributes():
    pool = draw_pool(0, 2)
    wanted = pool.attributes[[0, 5, 900]]
    found = pool.find(wanted, np.random.default_rng(0))
    assert np.array_equal(pool.attributes[found], wanted)


def test_demo_groups_are_fixed_and_told_in_words():
    plan, pictures = demo_group(1, 4, outsider=True)
    assert np.array_equal(pictures, demo_group(1, 4, outsider=True)[1])
    assert held_out(plan.target)
    assert "does not belong" in in_common(plan)
