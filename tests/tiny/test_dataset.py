"""The procedural dataset: its images, its groups, and the examples drawn from it."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import numpy as np
import pytest

from easyref_core.tiny import demo_group
from easyref_core.tiny.creatures import demo_group as creatures_demo_group
from easyref_core.tiny.dataset import Dataset
from easyref_core.tiny.demo_group import MAX_REFERENCES, demo_plan
from easyref_core.tiny.groups import Plan, evaluation_groups, plan_group, spread
from easyref_core.tiny.images import (
    ATTRIBUTES,
    COUNTS,
    IMAGE_SIZE,
    NAMES,
    all_combinations,
    caption,
    held_out,
    render,
)


def plans(count: int, references: int, **options: object) -> list[Plan]:
    rng = np.random.default_rng(0)
    return [plan_group(rng, references, **options) for _ in range(count)]


def test_one_triple_in_five_is_held_out_and_both_parts_have_every_value() -> None:
    combinations = all_combinations()
    mask = held_out(combinations)
    assert 0.18 < mask.mean() < 0.22
    for part in (combinations[mask], combinations[~mask]):
        assert [len(np.unique(column)) for column in part.T] == list(COUNTS)


def test_images_depend_on_the_seed_and_differ_within_a_combination() -> None:
    attributes = np.repeat(all_combinations()[:1], 3, axis=0)
    first, again = (render(attributes, np.random.default_rng(5)) for _ in range(2))
    assert first.shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_each_attribute_changes_the_image() -> None:
    for column, count in enumerate(COUNTS):
        attributes = np.zeros((count, len(COUNTS)), dtype=int)
        attributes[:, column] = np.arange(count)
        images = [render(row[None], np.random.default_rng(0))[0].astype(int) for row in attributes]
        differences = [np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]]
        assert min(differences) > 2, NAMES[column]


def test_a_caption_names_the_attributes_in_named() -> None:
    assert caption([0, 0, 1, 0, 1]) == "a red striped circle on sand at the left"
    assert caption([0, 0, 1, 0, 1], ["background"]) == "a thing on sand"
    assert caption([0, 0, 1, 0, 1], []) == ""


def test_every_word_belongs_to_one_value() -> None:
    words = [word for values in ATTRIBUTES.values() for word in values]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("references", [2, 3, 6])
def test_a_group_shares_its_shared_attributes_and_no_others(references: int) -> None:
    for plan in plans(100, references, outsider=False):
        for column, name in enumerate(NAMES):
            values = set(plan.references[:, column].tolist())
            if name in plan.shared:
                assert values == {plan.target[column]}
            else:
                assert len(values) == min(references, COUNTS[column])
        assert not set(plan.shared) & set(plan.named)


def test_an_outsider_shares_nothing() -> None:
    for plan in plans(50, 5, outsider=True):
        for name in plan.shared:
            column, target = plan.references[:, NAMES.index(name)], plan.target[NAMES.index(name)]
            assert column[plan.outsider] != target
            assert (np.delete(column, plan.outsider) == target).all()


def test_training_has_no_held_out_triple(dataset: Dataset) -> None:
    for plan in plans(300, 4):
        assert not held_out(plan.target)
        assert not held_out(plan.references).any()
    assert not held_out(dataset.attributes).any()


def test_evaluation_groups_have_held_out_targets_a_prompt_and_all_sizes() -> None:
    groups = list(evaluation_groups(3, 100))
    assert all(held_out(plan.target) and plan.named for plan in groups)
    assert Counter(len(plan.references) for plan in groups) == dict.fromkeys(range(2, 7), 20)
    assert 3 < sum(plan.outsider is not None for plan in groups) < 25


def test_spread_repeats_no_value_before_all_have_occurred() -> None:
    counts = Counter(spread(np.random.default_rng(0), 4, 6).tolist())
    assert sorted(counts.values()) == [1, 1, 2, 2]


def test_samples_have_the_given_attributes(dataset: Dataset) -> None:
    attributes = dataset.attributes[[0, 5, 900]]
    indices = dataset.sample(attributes, np.random.default_rng(0))
    assert np.array_equal(dataset.attributes[indices], attributes)


@pytest.mark.parametrize("world", [demo_group, creatures_demo_group])
def test_more_references_or_an_outsider_extend_a_demo_group(world: ModuleType) -> None:
    """All images, prompts and descriptions of an example are fixed by its number."""
    full = world.demo_group(1, MAX_REFERENCES, outsider=False)
    part = world.demo_group(1, 3, outsider=False)
    odd = world.demo_group(1, 3, outsider=True)
    assert np.array_equal(part.references, full.references[:3])
    assert np.array_equal(odd.references[:3], full.references[:3])
    assert len(odd.references) == 4
    assert full.prompt == part.prompt == odd.prompt != world.demo_group(2, 3, outsider=False).prompt
    assert full.shared == part.shared
    assert odd.shared == f"{full.shared} (but for reference 4, which does not belong)"


@pytest.mark.parametrize("number", range(30))
def test_demo_groups_of_shapes_vary_in_what_they_do_not_share(number: int) -> None:
    plan = demo_plan(number, 2, outsider=True)
    first, second, odd = plan.references
    shared = [name in plan.shared for name in NAMES]
    assert np.array_equal(first == second, shared)
    assert (odd != plan.target).all()
    assert (first == plan.target)[shared].all()
    assert held_out(plan.target)


@pytest.mark.parametrize("world", [demo_group, creatures_demo_group])
def test_prompts_of_demo_groups_are_in_the_words_of_the_world(world: ModuleType) -> None:
    words = {
        word for number in range(50) for word in world.demo_group(number, 2, outsider=False).prompt.split()
    }
    assert words <= world.WORDS
